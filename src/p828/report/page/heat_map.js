"use strict";
// Load of every expert over time: a column of dots for each dot of the width, a row for each expert.

const LEVELS_PER_DOUBLING = 32, MIDDLE = 128; // as report/heat_map.py makes the bytes
const DOUBLINGS = 3; // from an even share to the darkest colour
const LEAST_HEIGHT = 160, MOST_HEIGHT = 640, ROW_HEIGHT = 6, LABEL_HEIGHT = 14;

class HeatMap {
  constructor(view) {
    this.view = view;
    this.canvas = document.getElementById("heat-map");
    this.text = document.getElementById("heat-map-text");
    this.layers = document.getElementById("layer");
    this.layers.addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.tell(event));
    this.canvas.addEventListener("pointerdown", (event) => this.tell(event));
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
      context.fillStyle = colour("ink");
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
    return Math.max(placeOf(focus.heat_map.first, focus.stepAt(place, axis) + 1e-6) - 1, 0);
  }

  tell(event) {
    const map = this.view.focus.heat_map;
    const box = this.canvas.getBoundingClientRect();
    const column = this.columnAt((event.clientX - box.left - AXIS_WIDTH) / (box.width - AXIS_WIDTH));
    const layers = this.shownLayers(map);
    const row = Math.floor(((event.clientY - box.top) / box.height) * layers.length * map.experts);
    if (column < 0 || row < 0 || row >= layers.length * map.experts) return;
    const byte = map.bytes[(column * map.layers + layers[0]) * map.experts + row];
    const share = byte ? 2 ** ((byte - MIDDLE) / LEVELS_PER_DOUBLING) : 0;
    const [first, last] = [map.first[column], map.last[column]];
    const steps = first === last ? `step ${first}` : `steps ${first} to ${last}`;
    const layer = layers[0] + Math.floor(row / map.experts);
    this.text.textContent = `${steps}, layer ${layer}, expert ${row % map.experts}: ${share.toPrecision(3)} of an even share`;
  }
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
