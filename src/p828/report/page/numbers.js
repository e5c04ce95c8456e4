"use strict";
// Numbers as the page holds them, base64 of little-endian floats, and how they are shown.

const ARRAYS = { f4: Float32Array, f8: Float64Array };
const UNITS = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

function decoded(encoded) {
  return new ARRAYS[encoded.type](bytesOf(encoded.data).buffer);
}

async function unpacked(text, type) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new ARRAYS[type](await new Response(stream).arrayBuffer());
}

// The first index whose value is at least `wanted`, in ascending values.
function placeOf(values, wanted) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The value of `to` where `from` would be `wanted`, on the straight line between the two nearest points.
function interpolated(from, to, wanted) {
  if (!from.length) return wanted;
  const right = Math.min(Math.max(placeOf(from, wanted), 1), from.length - 1);
  if (from.length === 1) return to[0];
  const span = from[right] - from[right - 1];
  const part = span ? (wanted - from[right - 1]) / span : 0;
  return to[right - 1] + Math.min(Math.max(part, 0), 1) * (to[right] - to[right - 1]);
}

function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e15)) return value.toExponential(2);
  for (const [unit, name] of UNITS) if (size >= unit * 0.99999) return trimmed(value / unit) + name;
  return trimmed(value);
}

function trimmed(value) {
  return String(Number(value.toPrecision(4)));
}
