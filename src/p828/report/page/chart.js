"use strict";
// One chart of the page: its curves for what the view shows, with uPlot.

const HEIGHT = 220;
const AXIS_WIDTH = 62;
const DASHES = [[], [6, 3], [2, 2]];
const SERIES_COLOURS = 8;
const FOLLOWED = ["mousemove", "mouseleave"]; // what the other charts' cursors do, too

class Chart {
  constructor(about, view) {
    this.about = about;
    this.view = view;
    this.drawing = 0;
    this.isNear = this.isStale = false;
    this.plot = null;
    this.off = new Set(); // labels of the curves that the reader has hidden
    this.element = made("figure", { id: `chart-${about.id}` });
    this.title = made("span", {}, []);
    const caption = made("figcaption", {}, [this.title]);
    const button = made("button", { type: "button", className: "csv", title: "the numbers shown here, step by step" }, ["CSV"]);
    button.addEventListener("click", () => saveChart(this));
    caption.append(button);
    this.body = made("div", { className: "plot" });
    this.element.append(caption, this.body);
  }

  runs() {
    return this.about.of === "focus" ? [this.view.focus] : this.view.visible();
  }

  // [name, label] of each column that one of the runs has.
  columns(runs) {
    const { columns, prefix } = this.about;
    if (prefix) {
      const names = new Set(runs.flatMap((run) => Object.keys(run.columns)).filter((name) => name.startsWith(prefix)));
      return [...names].map((name) => [name, name.slice(prefix.length)]);
    }
    return columns.filter(([name]) => runs.some((run) => run.columns[name]));
  }

  // Is there only where it has something to show; what it shows may be of another view from now on.
  settle() {
    const { title, unit, of } = this.about;
    const text = unit ? `${title}, ${unit}` : title;
    this.title.textContent = of === "focus" ? this.view.named(text) : text;
    this.isStale = true;
    this.element.hidden = !this.columns(this.runs()).length;
  }

  async draw() {
    const drawing = ++this.drawing;
    this.isStale = false;
    const runs = this.runs();
    const columns = this.columns(runs);
    if (!columns.length) return;
    const { axis, range } = this.view;
    const names = columns.map(([name]) => name);
    const curves = await Promise.all(runs.map((run) => run.curves(names, axis, range)));
    if (drawing !== this.drawing) return; // the view has changed meanwhile
    const map = this.shown();
    const series = [], tables = [];
    curves.forEach(({ table: [x, ...extremes], means }, i) => {
      const lines = columns.map(([, label], j) => this.line(runs[i], label, j, runs.length));
      if (means) series.push(...lines.map((line, j) => asBand(line, series.length + 1 + columns.length + j)));
      series.push(...lines);
      tables.push([x, ...[...extremes, ...(means ?? [])].map((values) => values.map(map))]);
    });
    if (this.about.points) this.addPoints(runs, tables, series);
    const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    this.show(data, series, runs);
  }

  shown() {
    const { map, log } = this.about;
    return (value) => {
      if (value === null) return null;
      const shown = map ? map(value) : value;
      return log && shown <= 0 ? null : shown;
    };
  }

  line(run, label, columnNumber, runCount) {
    const isOne = runCount === 1;
    const hue = isOne && this.about.columns.length !== 1 ? columnNumber : run.number;
    const name = isOne ? label : `${run.name}: ${label}`;
    return {
      label: name, show: !this.off.has(name), stroke: colour(`series-${hue % SERIES_COLOURS}`), width: 1.25,
      dash: isOne ? [] : DASHES[columnNumber % DASHES.length], spanGaps: true, points: { show: false },
      value: (plot, value) => short(value),
    };
  }

  // Validation, a curve of points for each run that has any.
  addPoints(runs, tables, series) {
    for (const run of runs) {
      const known = run.evaluations.filter((one) => one.loss !== null);
      if (!known.length) continue;
      tables.push([known.map((one) => run.place(one.step, this.view.axis)), known.map((one) => this.about.points(one.loss))]);
      const label = runs.length === 1 ? "validation" : `${run.name}: validation`;
      series.push({
        label, show: !this.off.has(label), width: 1.5, spanGaps: true,
        stroke: runs.length === 1 ? colour("ink") : colour(`series-${run.number % SERIES_COLOURS}`),
        dash: [5, 4], points: { show: true, size: 6, fill: colour("ground") }, value: (plot, value) => short(value),
      });
    }
  }

  thresholds() {
    if (!this.about.thresholds) return [];
    const { large, exploding } = this.view.thresholds;
    const clip = this.view.focus.max_grad_norm;
    return [
      { value: large, label: `${large}: large`, severity: "warning", below: true },
      { value: exploding, label: `${exploding}: exploding`, severity: "critical" },
      ...(clip ? [{ value: clip, label: `clipped at ${clip}`, severity: "quiet" }] : []),
    ];
  }

  show(data, series, runs) {
    const { view } = this;
    const grid = { stroke: colour("grid"), width: 1 };
    const axis = { stroke: colour("quiet"), grid, ticks: grid, font: "12px system-ui, sans-serif" };
    const options = {
      width: Math.max(this.body.clientWidth, 200), height: HEIGHT,
      series: [{ label: view.axis, value: (plot, value) => short(value) }, ...series],
      scales: { x: { time: false, range: () => view.shown() }, y: this.about.log ? { distr: 3 } : {} },
      axes: [
        { ...axis, values: (plot, values) => values.map(short) },
        { ...axis, size: AXIS_WIDTH, values: (plot, values) => values.map((value) => (value === null ? "" : short(value))) },
      ],
      cursor: {
        sync: { key: "view", filters: { pub: (type) => FOLLOWED.includes(type) } }, drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => view.zoom(null) },
      },
      legend: { live: true, markers: { width: 0, fill: swatch } },
      hooks: { draw: [(plot) => drawMarks(plot, runs, view.axis, this.thresholds())], setSelect: [(plot) => this.select(plot)], setSeries: [hideBand, (...change) => this.note(...change)] },
    };
    this.plot?.destroy();
    this.body.replaceChildren();
    this.plot = new uPlot(options, data, this.body);
  }

  // Keeps which curves are hidden for the next drawing.
  note(plot, number, { show }) {
    if (number === null || show === undefined) return;
    if (show) this.off.delete(plot.series[number].label);
    else this.off.add(plot.series[number].label);
  }

  select(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    this.view.zoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
  }
}

// A piece of the curve, for its name in the legend: the background of an element.
function swatch(plot, number) {
  const { stroke, dash, points } = plot.series[number];
  const ink = stroke(plot, number);
  const [drawn, left] = dash.length ? dash : [1, 0];
  const line = `repeating-linear-gradient(to right, ${ink} 0 ${drawn}px, transparent ${drawn}px ${drawn + left}px) center / 100% 2px no-repeat`;
  const point = `radial-gradient(circle, ${colour("ground")} 1.5px, ${ink} 2px 3px, transparent 3.5px)`;
  return points.show(plot, number) ? `${point}, ${line}` : line;
}

// The least and greatest values behind a line of means, which is the chart's series number `meansAt`.
function asBand(line, meansAt) {
  return { ...line, meansAt, label: `${line.label}, least to greatest`, alpha: 0.35, dash: [], class: "band" };
}

// Has a press on a line's name show or hide the band behind it, too.
function hideBand(plot, number, { show }) {
  const band = plot.series.findIndex(({ meansAt }) => meansAt === number);
  if (number !== null && band > 0 && show !== undefined && plot.series[band].show !== show) plot.setSeries(band, { show });
}

function made(tag, properties = {}, children = []) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Replaces what is in an element, and leaves the focus and what is unfolded there where they were.
function refill(element, children) {
  const stops = () => [...element.querySelectorAll("button, input, summary")];
  const focused = stops().indexOf(document.activeElement);
  const open = [...element.querySelectorAll("details")].map((one) => one.open);
  element.replaceChildren(...children);
  element.querySelectorAll("details").forEach((one, i) => { one.open = open[i] ?? false; });
  if (focused >= 0) stops()[focused]?.focus({ preventScroll: true });
}
