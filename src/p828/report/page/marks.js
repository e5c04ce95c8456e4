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
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  for (const run of runs) {
    for (const event of run.events) drawVertical(plot, run.place(event.step, axis), colour("line"), [4, 4]);
  }
  drawFindings(plot, runs, axis);
  for (const { value, label, severity, below } of thresholds) drawHorizontal(plot, value, label, colour(severity), below);
  ctx.restore();
}

// A line for each finding, and its number beside it, or beside the number of the one before.
function drawFindings(plot, runs, axis) {
  const { ctx, bbox } = plot;
  const all = runs.flatMap((run) => run.findings.map((finding) => ({
    label: String(finding.number), place: run.place(finding.since, axis), stroke: colour(finding.severity),
  })));
  let free = -Infinity;
  for (const { label, place, stroke } of all.sort((one, other) => one.place - other.place)) {
    const x = drawVertical(plot, place, stroke, []);
    if (x === null) continue;
    const at = Math.max(x, free);
    const width = ctx.measureText(label).width + 6 * devicePixelRatio;
    ctx.fillStyle = stroke;
    ctx.fillRect(at, bbox.top, width, 15 * devicePixelRatio);
    ctx.fillStyle = colour("ground");
    ctx.fillText(label, at + 3 * devicePixelRatio, bbox.top + 11.5 * devicePixelRatio);
    free = at + width + devicePixelRatio;
  }
}

// Returns where it is drawn; null for a place outside.
function drawVertical(plot, place, stroke, dash) {
  const { ctx, bbox } = plot;
  const x = Math.round(plot.valToPos(place, "x", true));
  if (x < bbox.left || x > bbox.left + bbox.width) return null;
  drawLine(ctx, x, bbox.top, x, bbox.top + bbox.height, stroke, dash);
  return x;
}

function drawHorizontal(plot, value, label, stroke, below) {
  const { ctx, bbox } = plot;
  const y = Math.round(plot.valToPos(value, "y", true));
  if (!(y >= bbox.top && y <= bbox.top + bbox.height)) return;
  drawLine(ctx, bbox.left, y, bbox.left + bbox.width, y, stroke, [2, 3]);
  const height = 14 * devicePixelRatio, width = ctx.measureText(label).width + 8;
  const top = below || y - height < bbox.top ? y + devicePixelRatio : y - height;
  ctx.fillStyle = colour("ground");
  ctx.fillRect(bbox.left + bbox.width - width, top, width, height - devicePixelRatio);
  ctx.fillStyle = stroke;
  ctx.fillText(label, bbox.left + bbox.width - width + 4, top + 11 * devicePixelRatio);
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
