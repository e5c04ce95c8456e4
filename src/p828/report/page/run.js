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
    this.means = all(this.means);
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
      const text = held ? held.textContent : await (await fetch(`/detail/${this.number}/${encodeURIComponent(name)}`)).text();
      this.details.set(name, await unpacked(text, name in this.axes ? "f8" : "f4"));
    }
    return this.details.get(name);
  }

  // Places on the axis, and the columns there: [x, column, ...]. Where steps are thinned the columns are least and
  // greatest values, and `means`, which is null otherwise, has a column of means for each. `range` is null for the
  // whole run.
  async curves(names, axis, range) {
    if (range === null || this.whole || !this.count) {
      const count = this.axes[axis].length;
      const of = (columns) => names.map((name) => listed(columns[name], count));
      return { table: [Array.from(this.axes[axis]), ...of(this.columns)], means: this.whole ? null : of(this.means) };
    }
    const places = await this.detail(axis);
    const columns = await Promise.all(names.map((name) => this.detail(name)));
    const begin = Math.max(placeOf(places, range[0]) - 1, 0);
    const end = Math.min(placeOf(places, range[1]) + 1, places.length);
    const starts = bucketStarts(begin, end);
    const isThinned = starts.length < end - begin;
    return {
      table: [placesOf(places, starts, end), ...columns.map((column) => thinned(column, starts, end))],
      means: isThinned ? columns.map((column) => meansOf(column, starts, end)) : null,
    };
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
function thinned(values, starts, end) {
  if (!values) return new Array(starts.length === end - starts[0] ? starts.length : 2 * starts.length).fill(null);
  if (starts.length === end - starts[0]) return listed(values.slice(starts[0], end));
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

// The mean of each bucket's numbers, twice.
function meansOf(values, starts, end) {
  if (!values) return new Array(2 * starts.length).fill(null);
  return starts.flatMap((start, i) => {
    let sum = 0, count = 0;
    for (let at = start; at < (starts[i + 1] ?? end); at++) {
      if (Number.isNaN(values[at])) continue;
      sum += values[at];
      count++;
    }
    return count ? [sum / count, sum / count] : [null, null];
  });
}
