"use strict";
// Load of every expert over time: a column of dots for each dot of the width, a row for each expert.

const LEVELS_PER_DOUBLING = 32, MIDDLE = 128; // as report/heat_map.py makes the bytes
const DOUBLINGS = 3; // from an even share to the darkest colour
const KEYS = { // columns, experts and layers that a key goes on by
  ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0],
  PageUp: [0, 0, -1], PageDown: [0, 0, 1], Home: [-Infinity, 0, 0], End: [Infinity, 0, 0],
};
const LEAST_RING = 8; // px
const LEAST_HEIGHT = 160, MOST_HEIGHT = 640, ROW_HEIGHT = 6, LABEL_HEIGHT = 14;

class HeatMap {
  constructor(view) {
    this.view = view;
    this.canvas = document.getElementById("heat-map");
    this.text = document.getElementById("heat-map-text");
    this.hint = this.text.textContent;
    this.ring = document.getElementById("heat-map-cell");
    this.cell = null; // whose load is told: { step, layer, expert }
    this.layers = document.getElementById("layer");
    this.layers.addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.press(event));
    this.canvas.addEventListener("focus", () => { if (!this.cell) this.go(0, 0, 0); });
  }

  draw() {
    const map = this.view.focus.heat_map;
    document.getElementById("loads").hidden = !map;
    document.querySelector("#loads h2").textContent = this.view.named("Load of each expert");
    if (!map) return;
    map.bytes ??= bytesOf(map.shares);
    this.offerLayers(map.layers);
    const layers = this.shownLayers(map);
    const rows = layers.length * map.experts;
    const width = Math.max(this.canvas.clientWidth - AXIS_WIDTH, 100);
    const image = new ImageData(width, rows);
    const palette = loadPalette();
    for (let x = 0; x < width; x++) {
      const column = this.columnAt((x + 0.5) / width);
      if (column < 0) continue;
      for (let row = 0; row < rows; row++) {
        const byte = map.bytes[(column * map.layers + layers[0]) * map.experts + row];
        image.data.set(palette[byte], 4 * (row * width + x));
      }
    }
    this.paint(image, layers, map.experts);
    this.tell();
  }

  // The image beside the layers' names, under which the curves have their numbers.
  paint(image, layers, experts) {
    const rows = layers.length * experts;
    const height = Math.min(Math.max(rows * ROW_HEIGHT, LEAST_HEIGHT), MOST_HEIGHT);
    Object.assign(this.canvas, { width: (image.width + AXIS_WIDTH) * devicePixelRatio, height: height * devicePixelRatio });
    this.canvas.style.height = `${height}px`;
    const source = new OffscreenCanvas(image.width, rows);
    source.getContext("2d").putImageData(image, 0, 0);
    const context = this.canvas.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    context.imageSmoothingEnabled = false;
    context.drawImage(source, AXIS_WIDTH, 0, image.width, height);
    Object.assign(context, { textAlign: "right", textBaseline: "middle", font: "12px system-ui, sans-serif" });
    const layerHeight = height / layers.length;
    const every = Math.ceil(LABEL_HEIGHT / layerHeight);
    layers.forEach((layer, i) => {
      context.fillStyle = "#1b1c20"; // also in the dark, where the map is as bright
      if (i) context.fillRect(AXIS_WIDTH, Math.round(i * layerHeight), image.width, 1);
      context.fillStyle = colour("quiet");
      if (i % every === 0) context.fillText(`layer ${layer}`, AXIS_WIDTH - 6, (i + 0.5) * layerHeight);
    });
  }

  offerLayers(count) {
    if (this.layers.options.length === count + 1) return;
    const options = Array.from({ length: count }, (_, layer) => made("option", { value: layer }, [String(layer)]));
    this.layers.replaceChildren(made("option", { value: "" }, ["all"]), ...options);
  }

  shownLayers(map) {
    return this.layers.value === "" ? Array.from({ length: map.layers }, (_, i) => i) : [Number(this.layers.value)];
  }

  // The column of records at a part of the width; -1 where the run has none.
  columnAt(part) {
    const { focus, axis } = this.view;
    const [from, to] = this.view.shown();
    const place = from + part * (to - from);
    const [first, last] = focus.extent(axis);
    if (place < first || place > last) return -1;
    return this.columnOf(focus.stepAt(place, axis));
  }

  columnOf(step) {
    return Math.max(placeOf(this.view.focus.heat_map.first, step + 1e-6) - 1, 0);
  }

  // The first and the last column in view; null where the run has none there.
  shownColumns() {
    const { focus, axis } = this.view;
    const [from, to] = this.view.shown(), [first, last] = focus.extent(axis);
    if (from > last || to < first) return null;
    return [Math.max(from, first), Math.min(to, last)].map((place) => this.columnOf(focus.stepAt(place, axis)));
  }

  point(event) {
    const map = this.view.focus.heat_map;
    const box = this.canvas.getBoundingClientRect();
    const column = this.columnAt((event.clientX - box.left - AXIS_WIDTH) / (box.width - AXIS_WIDTH));
    const layers = this.shownLayers(map);
    const row = Math.floor(((event.clientY - box.top) / box.height) * layers.length * map.experts);
    if (column < 0 || row < 0 || row >= layers.length * map.experts) return;
    this.cell = { step: map.first[column], layer: layers[0] + Math.floor(row / map.experts), expert: row % map.experts };
    this.tell();
  }

  press(event) {
    const by = KEYS[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    this.go(...by);
    this.ring.scrollIntoView({ block: "nearest" });
  }

  // Goes on from the cell that is told, or from the newest one, within what is shown.
  go(columns, experts, layers) {
    const map = this.view.focus.heat_map, ends = this.shownColumns();
    if (!ends) return;
    const shown = this.shownLayers(map);
    const from = this.cell ?? { step: Infinity, layer: 0, expert: 0 };
    const layer = clamped(from.layer + layers, shown[0], shown.at(-1));
    const row = clamped(layer * map.experts + from.expert + experts, shown[0] * map.experts, (shown.at(-1) + 1) * map.experts - 1);
    const column = clamped(clamped(this.columnOf(from.step), ...ends) + columns, ...ends);
    this.cell = { step: map.first[column], layer: Math.floor(row / map.experts), expert: row % map.experts };
    this.tell();
  }

  // Says the load of the cell, and has the ring around it.
  tell() {
    const map = this.view.focus.heat_map;
    if (this.cell && (this.cell.layer >= map.layers || this.cell.expert >= map.experts)) this.cell = null; // another run's
    const text = this.cell ? this.textOf(map, this.cell) : this.hint;
    if (this.text.textContent !== text) this.text.textContent = text; // a screen reader reads what is set
    this.encircle(map);
  }

  textOf(map, { step, layer, expert }) {
    const column = this.columnOf(step);
    const byte = map.bytes[(column * map.layers + layer) * map.experts + expert];
    const share = byte ? 2 ** ((byte - MIDDLE) / LEVELS_PER_DOUBLING) : 0;
    const [first, last] = [map.first[column], map.last[column]];
    const steps = first === last ? `step ${first}` : `steps ${first} to ${last}`;
    return `${steps}, layer ${layer}, expert ${expert}: ${share.toPrecision(3)} of an even share`;
  }

  encircle(map) {
    const { focus, axis } = this.view;
    const column = this.cell && this.columnOf(this.cell.step), ends = this.shownColumns();
    const layers = this.shownLayers(map);
    this.ring.hidden = !this.cell || !ends || column < ends[0] || column > ends[1] || !layers.includes(this.cell.layer);
    if (this.ring.hidden) return;
    const [from, to] = this.view.shown(), [begin, end] = focus.extent("steps");
    const [left, right] = [column ? map.first[column] : begin, map.first[column + 1] ?? end]
      .map((step) => clamped((focus.place(step, axis) - from) / (to - from), 0, 1) * (this.canvas.clientWidth - AXIS_WIDTH));
    const height = this.canvas.clientHeight / (layers.length * map.experts);
    const row = (this.cell.layer - layers[0]) * map.experts + this.cell.expert;
    const [wide, high] = [Math.max(right - left, LEAST_RING), Math.max(height, LEAST_RING)];
    Object.assign(this.ring.style, {
      left: `${AXIS_WIDTH + (left + right - wide) / 2}px`, width: `${wide}px`,
      top: `${(row + 0.5) * height - high / 2}px`, height: `${high}px`,
    });
  }
}

function clamped(value, least, greatest) {
  return Math.min(Math.max(value, least), greatest);
}

// A colour for each byte: blue under an even share, pale at it, orange over it; black for no token.
function loadPalette() {
  const low = [26, 72, 138], even = [244, 240, 228], high = [184, 78, 8];
  return Array.from({ length: 256 }, (_, byte) => {
    if (!byte) return [0, 0, 0, 255];
    const part = Math.min(Math.max((byte - MIDDLE) / LEVELS_PER_DOUBLING / DOUBLINGS, -1), 1);
    const end = part < 0 ? low : high;
    return [...even.map((value, i) => Math.round(value + Math.abs(part) * (end[i] - value))), 255];
  });
}
