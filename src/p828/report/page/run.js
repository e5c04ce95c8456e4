"use strict";
// A run's curves: thinned ones for the whole run, and those of all steps, fetched once somebody zooms in.

const BUCKETS = 800; // of the steps that are shown; a wide screen has some 1,000 dots for them

class Run {
  constructor(values, number) {
    Object.assign(this, values);
    this.number = number;
    this.details = new Map();
    this.decode();
  }

  decode() {
    const all = (encoded) => Object.fromEntries(Object.entries(encoded).map(([name, one]) => [name, decoded(one)]));
    this.axes = all(this.axes);
    this.columns = all(this.columns);
  }

  // Where a step is on an axis.
  place(step, axis) {
    return axis === "steps" ? step : interpolated(this.axes.steps, this.axes[axis], step);
  }

  stepAt(place, axis) {
    return axis === "steps" ? place : interpolated(this.axes[axis], this.axes.steps, place);
  }

  extent(axis) {
    const values = this.axes[axis];
    return values.length ? [values[0], values[values.length - 1]] : [0, 1];
  }

  // An axis or a column with all of its steps.
  async detail(name) {
    const overview = this.axes[name] ?? this.columns[name];
    if (this.whole || !overview) return overview;
    if (!this.details.has(name)) {
      const place = `detail/${this.number}/${name}`;
      const held = document.getElementById(place);
      const text = held ? held.textContent : await (await fetch("/" + place)).text();
      this.details.set(name, await unpacked(text, name in this.axes ? "f8" : "f4"));
    }
    return this.details.get(name);
  }

  // Places on the axis, and the columns there: [x, column, ...]. `range` is null for the whole run.
  async curves(names, axis, range) {
    if (range === null || this.whole || !this.count) {
      return [Array.from(this.axes[axis]), ...names.map((name) => listed(this.columns[name], this.axes[axis].length))];
    }
    const places = await this.detail(axis);
    const columns = await Promise.all(names.map((name) => this.detail(name)));
    const begin = Math.max(placeOf(places, range[0]) - 1, 0);
    const end = Math.min(placeOf(places, range[1]) + 1, places.length);
    const starts = bucketStarts(begin, end);
    return [placesOf(places, starts, end), ...columns.map((column) => thinned(column, starts, end, places.length))];
  }
}

function listed(values, count) {
  if (!values) return new Array(count).fill(null);
  return Array.from(values, (value) => (Number.isFinite(value) ? value : null));
}

function bucketStarts(begin, end) {
  const count = end - begin;
  const buckets = count <= 2 * BUCKETS ? count : BUCKETS;
  return Array.from({ length: buckets }, (_, i) => begin + Math.floor((i * count) / buckets));
}

function placesOf(places, starts, end) {
  if (starts.length === end - starts[0]) return Array.from(places.slice(starts[0], end));
  return starts.flatMap((start, i) => [places[start], places[(starts[i + 1] ?? end) - 1]]);
}

// Least and greatest value of each bucket, as report/buckets.py has it.
function thinned(values, starts, end, count) {
  if (!values) return new Array(starts.length === end - starts[0] ? starts.length : 2 * starts.length).fill(null);
  if (starts.length === end - starts[0]) return listed(values.slice(starts[0], end), count);
  return starts.flatMap((start, i) => {
    const stop = starts[i + 1] ?? end;
    let low = Infinity, high = -Infinity;
    for (let at = start; at < stop; at++) {
      const value = values[at];
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low > high) return [null, null];
    return values[start] > values[stop - 1] ? [high, low] : [low, high];
  });
}
