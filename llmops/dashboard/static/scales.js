// Where values lie on an axis, and which of them are written beside it.

import { literal, number } from "./format.js";

/** A linear or logarithmic scale over `values`, from pixel `from` to pixel `to`. */
export function numbers(values, log, from, to, format = number) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) [low, high] = [0, 1];
  const warped = log && low > 0;
  if (low === high) [low, high] = warped ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const warp = warped ? Math.log10 : (value) => value;
  const span = warp(high) - warp(low);
  const place = (value) => from + ((warp(value) - warp(low)) / span) * (to - from);
  return { place, low, high, ticks: warped ? logTicks(low, high, format) : linearTicks(low, high, format) };
}

function linearTicks(low, high, format) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-12) && ticks.length < 12; n++) ticks.push(n * step);
  return ticks.map((tick) => [tick, format(Math.abs(tick) < step * 1e-6 ? 0 : tick)]);
}

function logTicks(low, high, format) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of high / low < 100 ? [1, 2, 5] : [1]) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push([tick, format(tick)]);
    }
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high, format);
}

/** A scale over names. */
export function choices(values, from, to) {
  const names = [...new Set(values.map(literal))];
  const gap = (to - from) / Math.max(1, names.length);
  const places = new Map(names.map((name, index) => [name, from + gap * (index + 0.5)]));
  return { place: (value) => places.get(literal(value)), ticks: names.map((name) => [name, name]) };
}

const SPANS_S = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, 86400, 172800, 604800, 2592000];
/** Epoch seconds: ticks at whole minutes, hours or days of local time. */
export function times(low, high, from, to, most = 6) {
  if (high <= low) high = low + 1;
  const step = SPANS_S.find((each) => (high - low) / each <= most) ?? 2592000 * Math.ceil((high - low) / 2592000 / most);
  const shift = new Date(low * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let at = Math.ceil((low - shift) / step) * step + shift; at <= high; at += step) {
    const day = new Date(at * 1000), clock = day.toTimeString().slice(0, step < 60 ? 8 : 5);
    ticks.push([at, step >= 86400 ? `${day.getMonth() + 1}/${day.getDate()}` : clock]);
  }
  return { place: (value) => from + ((value - low) / (high - low)) * (to - from), ticks, low, high };
}
