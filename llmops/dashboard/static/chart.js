// Lines over steps or time, with a cursor for pointer and keyboard, a legend that hides lines, and a table of the data.

import { announce, dataTable, h, onWidth, s, setText } from "./dom.js";
import { count, duration, number } from "./format.js";
import { numbers } from "./scales.js";

const HEIGHT = 230, LEFT = 54, RIGHT = 14, TOP = 10, BOTTOM = 24;
const TABLE_ROWS = 100, MOST_DOTS = 40;
export const LINES = 8; // styles; lines past them begin again

/** Exponential moving average, without a pull towards the first value. */
function smoothed(points, factor) {
  let sum = 0, weight = 0;
  return points.map(([x, y]) => {
    if (y === null) return [x, null];
    sum = factor * sum + (1 - factor) * y;
    weight = factor * weight + (1 - factor);
    return [x, sum / weight];
  });
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1;
    else high = middle;
  }
  if (low > 0 && Math.abs(points[low - 1][0] - x) <= Math.abs(points[low][0] - x)) low -= 1;
  return points[low];
}

/**
 * `update({lines, x, log, smooth})` draws. A line is {id, name, style, points: [[x, y or null]], dots}; x is "step" or
 * "seconds"; `format` is for values.
 */
export function lineChart(title, format = number) {
  const at = h("span", { class: "chart-at" });
  const plot = s("svg", { class: "plot", "aria-hidden": "true" });
  const box = h("div", {
    class: "chart", tabindex: 0, role: "group", "aria-roledescription": "chart",
    "aria-label": `${title}. Left and right arrows move the cursor.`,
  }, plot);
  const legend = h("ul", { class: "legend", "aria-label": `Lines of ${title}` });
  const table = dataTable(`${title}: data`, () => tableOf());
  const head = h("div", { class: "panel-head" }, h("h2", { text: title }), at);
  const el = h("section", { class: "panel", "aria-label": title }, head, box, legend, table.el);
  const hidden = new Set();
  let state = { lines: [], x: "step", log: false, smooth: 0 };
  let shown = [], entries = new Map(), xs = [], cursor = null, scale = null;
  const sayX = (x) => (state.x === "step" ? `step ${count(Math.round(x))}` : duration(x));

  function tableOf() {
    const every = Math.max(1, Math.ceil(xs.length / TABLE_ROWS));
    const picked = xs.filter((_, index) => index % every === 0 || index === xs.length - 1);
    const maps = state.lines.map((line) => new Map(line.points));
    return {
      head: [state.x === "step" ? "step" : "time", ...state.lines.map((line) => line.name)],
      rows: picked.map((x) => [state.x === "step" ? count(x) : duration(x), ...maps.map((map) => format(map.get(x) ?? null))]),
    };
  }

  function update(next) {
    state = { ...state, ...next };
    xs = [...new Set(state.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
    draw();
    table.refresh();
  }

  function draw() {
    const width = Math.max(box.clientWidth || 600, 240);
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    shown = state.lines.filter((line) => !hidden.has(line.id)).map((line) => ({
      ...line, smooth: state.smooth && !line.dots ? smoothed(line.points, state.smooth) : line.points,
    }));
    const values = shown.flatMap((line) => line.points.map((point) => point[1]).filter((value) => value !== null));
    const log = state.log && values.every((value) => value > 0);
    const sayTick = state.x === "step" ? (value) => (Number.isInteger(value) ? count(value) : "") : duration;
    const x = numbers(shown.flatMap((line) => line.points.map((point) => point[0])), false, LEFT, width - RIGHT, sayTick);
    const y = numbers(values, log, HEIGHT - BOTTOM, TOP, format);
    scale = { x, y, width };
    const parts = [];
    for (const [value, text] of y.ticks) {
      parts.push(s("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.place(value), y2: y.place(value) }));
      parts.push(s("text", { x: LEFT - 7, y: y.place(value) + 4, "text-anchor": "end", text }));
    }
    const every = Math.ceil((x.ticks.length * 62) / (width - LEFT)) || 1;
    x.ticks.filter((_, index) => index % every === 0).forEach(([value, text]) => {
      const px = x.place(value);
      parts.push(s("text", { x: px, y: HEIGHT - 6, "text-anchor": px > width - 40 ? "end" : "middle", text }));
    });
    for (const line of shown) {
      if (line.smooth !== line.points) parts.push(s("path", { class: `line raw l${line.style}`, d: path(line.points, log) }));
      parts.push(s("path", { class: `line l${line.style}`, d: path(line.smooth, log) }));
      const lone = line.points.filter((point) => point[1] !== null);
      if ((line.dots && lone.length <= MOST_DOTS) || lone.length === 1) {
        for (const [px, py] of lone) parts.push(s("circle", { class: `point l${line.style}`, cx: x.place(px), cy: y.place(py), r: 3.5 }));
      }
    }
    if (!values.length) {
      parts.push(s("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", text: "nothing has been measured yet" }));
    }
    plot.replaceChildren(...parts);
    drawLegend();
    if (cursor !== null) point(cursor, false);
  }

  function path(points) {
    let text = "", open = false;
    for (const [px, py] of points) {
      if (py === null) open = false;
      else {
        text += `${open ? "L" : "M"}${scale.x.place(px).toFixed(1)},${scale.y.place(py).toFixed(1)}`;
        open = true;
      }
    }
    return text;
  }

  function drawLegend() {
    const names = state.lines.map((line) => `${line.id} ${line.name} ${line.style}`).join("\n");
    if (legend.dataset.names !== names) {
      legend.dataset.names = names;
      entries = new Map();
      legend.replaceChildren(...state.lines.map((line) => {
        const sample = s("svg", { width: 22, height: 8, "aria-hidden": "true" }, s("line", { class: `line l${line.style}`, x1: 0, x2: 22, y1: 4, y2: 4 }));
        const value = h("span", { class: "value" });
        const button = h("button", { type: "button", title: line.name }, sample, h("span", { class: "label", text: line.name }), value);
        button.addEventListener("click", () => {
          if (!hidden.delete(line.id)) hidden.add(line.id);
          draw();
        });
        entries.set(line.id, { button, value });
        return h("li", {}, button);
      }));
    }
    for (const [id, { button }] of entries) button.setAttribute("aria-pressed", String(!hidden.has(id)));
    values(null);
  }

  /** The legend's values: at the cursor, or the last ones. */
  function values(x) {
    const said = [];
    for (const line of shown) {
      const known = line.smooth.filter((point) => point[1] !== null);
      const found = known.length ? (x === null ? known.at(-1) : nearest(known, x)) : null;
      const outside = found && x !== null && (x < known[0][0] || x > known.at(-1)[0]);
      const text = found && !outside ? format(found[1]) : "–";
      const entry = entries.get(line.id);
      if (entry) setText(entry.value, text);
      if (found && !outside) said.push(`${line.name} ${text}`);
    }
    return said;
  }

  function point(x, aloud) {
    cursor = x;
    plot.querySelector(".cursor")?.remove();
    if (x === null) {
      setText(at, "");
      values(null);
      return;
    }
    const px = scale.x.place(x);
    plot.append(s("line", { class: "cursor", x1: px, x2: px, y1: TOP, y2: HEIGHT - BOTTOM }));
    setText(at, sayX(x));
    const said = values(x);
    if (aloud) announce(`${sayX(x)}: ${said.join(", ") || "no values"}`);
  }

  box.addEventListener("pointermove", (event) => {
    if (!xs.length || !scale) return;
    const frame = plot.getBoundingClientRect(), px = ((event.clientX - frame.left) / frame.width) * scale.width;
    const share = (px - LEFT) / (scale.width - RIGHT - LEFT);
    const wanted = scale.x.low + share * (scale.x.high - scale.x.low);
    point(nearest(xs.map((x) => [x]), wanted)[0], false);
  });
  box.addEventListener("pointerleave", () => { if (document.activeElement !== box) point(null, false); });
  box.addEventListener("blur", () => point(null, false));
  box.addEventListener("keydown", (event) => {
    if (!xs.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const now = cursor === null ? -1 : xs.indexOf(nearest(xs.map((x) => [x]), cursor)[0]);
    const leap = Math.max(1, Math.round(xs.length / 20));
    const last = xs.length - 1;
    const to = {
      ArrowLeft: now < 0 ? last : now - 1, ArrowRight: now < 0 ? 0 : now + 1, PageUp: now - leap, PageDown: now + leap, Home: 0, End: last,
    }[event.key];
    if (event.key === "Escape" && cursor !== null) point(null, false);
    else if (to === undefined) return;
    else point(xs[Math.min(Math.max(to, 0), last)], true);
    event.preventDefault();
    event.stopPropagation();
  });
  const watched = onWidth(box, draw);
  return { el, head, update, close: () => watched.disconnect() };
}

/** Columns of a series as points; `x`: "step", "elapsed" or "clock" (epoch seconds become seconds since the first). */
export function pointsOf(series, key, x = "step", origin = null) {
  const start = origin ?? series.time?.find((time) => time !== null) ?? 0;
  return (series.step ?? []).map((step, index) => {
    const time = series.time?.[index];
    return [x === "step" ? step : time === null || time === undefined ? null : time - start, series[key]?.[index] ?? null];
  }).filter(([at]) => at !== null);
}
