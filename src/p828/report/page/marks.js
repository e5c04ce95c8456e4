"use strict";
// What is drawn over the curves: findings, events, thresholds.

const SEVERITIES = ["critical", "warning", "note"];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function drawMarks(plot, runs, axis, thresholds) {
  const { ctx } = plot;
  ctx.save();
  ctx.beginPath();
  ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
  ctx.clip();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  for (const run of runs) {
    for (const event of run.events) drawVertical(plot, run.place(event.step, axis), colour("line"), [4, 4], "");
    run.findings.forEach((finding, number) => {
      drawVertical(plot, run.place(finding.since, axis), colour(finding.severity), [], String(number + 1));
    });
  }
  for (const { value, label, severity } of thresholds) drawHorizontal(plot, value, label, colour(severity));
  ctx.restore();
}

function drawVertical(plot, place, stroke, dash, label) {
  const { ctx, bbox } = plot;
  const x = Math.round(plot.valToPos(place, "x", true));
  if (x < bbox.left || x > bbox.left + bbox.width) return;
  drawLine(ctx, x, bbox.top, x, bbox.top + bbox.height, stroke, dash);
  if (label) {
    const width = ctx.measureText(label).width + 6 * devicePixelRatio;
    ctx.fillStyle = stroke;
    ctx.fillRect(x, bbox.top, width, 15 * devicePixelRatio);
    ctx.fillStyle = colour("ground");
    ctx.fillText(label, x + 3 * devicePixelRatio, bbox.top + 11.5 * devicePixelRatio);
  }
}

function drawHorizontal(plot, value, label, stroke) {
  const { ctx, bbox } = plot;
  const y = Math.round(plot.valToPos(value, "y", true));
  if (!(y >= bbox.top && y <= bbox.top + bbox.height)) return;
  drawLine(ctx, bbox.left, y, bbox.left + bbox.width, y, stroke, [2, 3]);
  ctx.fillStyle = stroke;
  ctx.fillText(label, bbox.left + bbox.width - ctx.measureText(label).width - 4, y - 4 * devicePixelRatio);
}

function drawLine(ctx, fromX, fromY, toX, toY, stroke, dash) {
  ctx.beginPath();
  ctx.strokeStyle = stroke;
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
  ctx.moveTo(fromX, fromY);
  ctx.lineTo(toX, toY);
  ctx.stroke();
}
