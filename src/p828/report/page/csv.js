"use strict";
// The numbers behind the curves, a line a step, as a file.

const LINES_A_PIECE = 20000;
const VALIDATION = "validation_loss"; // which has numbers at evaluations only

async function saveChart(chart) {
  const runs = chart.runs();
  const names = [...chart.columns(runs).map(([name]) => name), ...(chart.about.points ? [VALIDATION] : [])];
  save(`${chart.about.id}.csv`, await linesOf(runs, names, chart.view));
}

async function saveRun(view) {
  const names = [...Object.keys(view.focus.columns), VALIDATION];
  save(`${view.focus.name}.csv`, await linesOf([view.focus], names, view));
}

async function linesOf(runs, names, view) {
  const pieces = [["run", "step", "tokens", "hours", ...names].map(quoted).join(",") + "\n"];
  for (const run of runs) {
    const axes = await Promise.all(["steps", "tokens", "hours"].map((name) => run.detail(name)));
    const columns = await Promise.all(names.map((name) => (name === VALIDATION ? validationOf(run, axes[0]) : run.detail(name))));
    const [from, to] = view.shown();
    const places = axes[["steps", "tokens", "hours"].indexOf(view.axis)];
    let lines = [];
    for (let i = 0; i < axes[0].length; i++) {
      if (places[i] < from || places[i] > to) continue;
      const cells = columns.map((column) => (column && !Number.isNaN(column[i]) ? Number(column[i].toPrecision(7)) : ""));
      lines.push([quoted(run.name), ...axes.map((axis) => axis[i]), ...cells].join(","));
      if (lines.length === LINES_A_PIECE) {
        pieces.push(lines.join("\n") + "\n");
        lines = [];
      }
    }
    if (lines.length) pieces.push(lines.join("\n") + "\n");
  }
  return pieces;
}

// The run's validation losses at its `steps`; NaN where it was not evaluated.
function validationOf(run, steps) {
  const losses = new Map(run.evaluations.map(({ step, loss }) => [step, loss]));
  return Float64Array.from(steps, (step) => losses.get(step) ?? NaN);
}

function quoted(text) {
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save(name, pieces) {
  const address = URL.createObjectURL(new Blob(pieces, { type: "text/csv" }));
  const link = made("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
