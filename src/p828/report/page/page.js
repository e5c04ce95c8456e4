"use strict";
// The page's state, `View`, and what changes it.

const NEWS_EVERY = 3000; // ms
const NEAR = "400px 0px"; // of the window: charts there are drawn before they are seen
const CONTEXT = 0.02; // of the run: shown before a finding's first step, and three times as much after it
const LEAST_CONTEXT = 20; // steps

class View {
  constructor(payload) {
    this.hidden = new Set();
    this.drawings = 0;
    this.axis = "steps";
    this.range = null; // of the axis; null for the whole runs
    this.take(payload);
    this.charts = CHARTS.map((about) => new Chart(about, this));
    this.heatMap = new HeatMap(this);
    document.getElementById("charts").append(...this.charts.map((chart) => chart.element));
    const observer = new IntersectionObserver((entries) => entries.forEach((entry) => this.near(entry)), { rootMargin: NEAR });
    for (const chart of this.charts) observer.observe(chart.element);
  }

  // A chart that comes into view, or is about to, shows what the others show.
  near({ target, isIntersecting }) {
    const chart = this.charts.find((one) => one.element === target);
    chart.isNear = isIntersecting;
    if (isIntersecting && chart.isStale) chart.draw();
  }

  take(payload) {
    this.thresholds = payload.thresholds;
    this.sameRows = payload.same_rows;
    this.runs = payload.runs.map((values, number) => new Run(values, number));
    this.runs.flatMap((run) => run.findings).forEach((finding, i) => { finding.number = i + 1; });
    this.focus = this.runs[this.focus?.number ?? 0];
  }

  // The title of what is of the run in focus only.
  named(title) {
    return this.runs.length > 1 ? `${title}: ${this.focus.name}` : title;
  }

  visible() {
    return this.runs.filter((run) => !this.hidden.has(run.number));
  }

  // From where to where the charts reach.
  shown() {
    if (this.range) return this.range;
    const begun = this.visible().filter((run) => run.count);
    if (!begun.length) return [0, 1];
    const extents = begun.map((run) => run.extent(this.axis));
    const from = Math.min(...extents.map(([first]) => first)), to = Math.max(...extents.map(([, last]) => last));
    return to > from ? [from, to] : [from - 0.5, from + 0.5];
  }

  zoom(range) {
    this.range = range && range[1] > range[0] ? range : null;
    return this.draw();
  }

  // Shows the steps around a finding.
  look(run, finding) {
    this.hidden.delete(run.number);
    this.focus = run;
    const [first, last] = run.extent("steps");
    const around = Math.max(CONTEXT * (last - first), LEAST_CONTEXT);
    const steps = [Math.max(finding.since - around, first), Math.min(finding.since + 3 * around, last)];
    showRuns(this);
    showSamples(this);
    return this.zoom(steps.map((step) => run.place(step, this.axis)));
  }

  // Moves what is shown by `by` of its width, and makes it `times` as wide.
  move(by, times) {
    const [from, to] = this.shown();
    const width = to - from, middle = (from + to) / 2 + by * width;
    return this.zoom([middle - (width * times) / 2, middle + (width * times) / 2]);
  }

  // Draws the charts that are in view; the others once they come into it.
  draw() {
    return this.drawThose((chart) => chart.isNear);
  }

  drawThose(isDue) {
    const drawing = ++this.drawings;
    document.body.dataset.drawn = "";
    for (const chart of this.charts) chart.settle();
    const drawn = this.charts.filter(isDue).map((chart) => chart.draw());
    this.heatMap.draw();
    return Promise.all(drawn).then(() => {
      if (drawing === this.drawings) document.body.dataset.drawn = "yes";
    });
  }

  drawAll() {
    showRuns(this);
    showFindings(this);
    showSamples(this);
    showAbout(this);
    return this.drawThose(() => true);
  }
}

function showRuns(view) {
  const entries = view.runs.map((run) => {
    const { state, step, steps, loss } = run.summary;
    const box = made("input", { type: "checkbox", checked: !view.hidden.has(run.number) });
    box.addEventListener("change", () => {
      if (box.checked) view.hidden.delete(run.number);
      else if (view.visible().length > 1) view.hidden.add(run.number);
      else box.checked = true;
      view.draw();
    });
    const text = `${state}, step ${step ?? 0}${steps ? ` of ${steps}` : ""}${loss === null ? "" : `, loss ${typeof loss === "number" ? loss.toFixed(3) : loss}`}`;
    const swatch = made("span", { className: "swatch" });
    swatch.style.background = `var(--series-${run.number % SERIES_COLOURS})`;
    return made("li", {}, [made("label", {}, [...(view.runs.length > 1 ? [box, swatch] : []), made("strong", {}, [run.name]), ` ${text}`])]);
  });
  refill(document.getElementById("runs"), entries);
  const focus = document.getElementById("focus");
  document.getElementById("focus-label").hidden = view.runs.length === 1;
  focus.replaceChildren(...view.runs.map((run) => made("option", { value: run.number, selected: run === view.focus }, [run.name])));
}

function listen(view) {
  const on = (id, event, act) => document.getElementById(id).addEventListener(event, act);
  on("axis", "change", (event) => {
    const { axis, range, focus } = view;
    view.axis = event.target.value;
    view.zoom(range && range.map((place) => focus.place(focus.stepAt(place, axis), view.axis)));
  });
  on("left", "click", () => view.move(-0.5, 1));
  on("right", "click", () => view.move(0.5, 1));
  on("in", "click", () => view.move(0, 0.5));
  on("out", "click", () => view.move(0, 2));
  on("whole", "click", () => view.zoom(null));
  on("csv", "click", () => saveRun(view));
  on("focus", "change", (event) => {
    view.focus = view.runs[event.target.value];
    showSamples(view);
    view.draw();
  });
  let width = innerWidth;
  addEventListener("resize", () => { // not for a phone's bars, which change the height alone
    if (innerWidth !== width) view.draw();
    width = innerWidth;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.draw());
}

async function follow(view, version) {
  const news = document.getElementById("news");
  news.hidden = false;
  for (;;) {
    await new Promise((done) => setTimeout(done, NEWS_EVERY));
    const payload = await newsAfter(version);
    news.textContent = payload === null ? "p828 report does not answer: the page shows what it had"
      : `live, ${new Date().toLocaleTimeString()}`;
    if (!payload?.runs) continue;
    version = payload.version;
    view.take(payload);
    await view.drawAll();
  }
}

// The newest numbers; {} if there are none since, null if nobody answers.
async function newsAfter(version) {
  try {
    const answer = await fetch(`/data?after=${version}`);
    if (!answer.ok) return null;
    return answer.status === 204 ? {} : await answer.json();
  } catch {
    return null;
  }
}

function begin() {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const view = globalThis.page = new View(payload); // also for whoever looks into it from the console
  listen(view);
  view.drawAll().then(() => { document.body.dataset.openMs = Math.round(performance.now()); });
  if (payload.version !== null) follow(view, payload.version);
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
else begin();
