// Parallel coordinates: each trial a line over its parameters and its objective; a drag along an axis filters.

import { announce, h, onWidth, s } from "./dom.js";
import { known, literal } from "./format.js";
import { choices, numbers } from "./scales.js";

const HEIGHT = 340, TOP = 40, BOTTOM = 322;
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const isNumber = (value) => typeof value === "number";

/** `changed(visible)` is told which trials the brushes leave, `lit(trial or null)` which one is pointed at. */
export function parallel(study, { changed, lit }) {
  const { trials } = study;
  const counted = new Set(study.counted);
  const tenth = new Map(study.counted.map((trial, rank) => [trial, Math.min(9, Math.floor((rank / study.counted.length) * 10))]));
  const painted = [...trials].sort((a, b) => (tenth.get(b.trial) ?? 99) - (tenth.get(a.trial) ?? 99)); // the best on top
  const brushes = new Map();
  const lines = new Map(); // by trial: {path, points}
  const plot = s("svg", { class: "plot parallel", "aria-hidden": "true" });
  const el = h("div", {
    class: "chart scroll", tabindex: 0, role: "group", "aria-roledescription": "parallel coordinates",
    "aria-label": "Parameters and objective of all trials. Up and down arrows move from trial to trial, the best first.",
  }, plot);
  const dimensions = [
    ...study.axes.map((axis) => ({ key: axis.key, axis, get: (row) => row.params[axis.key] })),
    { key: study.study.objective, axis: null, get: (row) => row.value },
  ].map((each) => {
    const values = trials.map(each.get).filter(known);
    const named = each.axis && (each.axis.kind === "choice" || !values.every(isNumber));
    const order = each.axis?.values ?? [];
    return { ...each, ...(named ? choices([...order, ...values], BOTTOM, TOP) : numbers(values, each.axis?.log, BOTTOM, TOP)) };
  });
  let visible = new Set(trials.map((row) => row.trial)), on = null;

  function draw() {
    const width = Math.max(el.clientWidth, dimensions.length * 124);
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    plot.style.width = `${width}px`;
    plot.classList.toggle("many", trials.length > 200);
    dimensions.forEach((each, index) => {
      each.x = dimensions.length > 1 ? 64 + (index * (width - 136)) / (dimensions.length - 1) : width / 2;
    });
    lines.clear();
    const parts = [];
    for (const row of painted) {
      const points = dimensions.filter((each) => known(each.get(row))).map((each) => [each.x, each.place(each.get(row))]);
      if (!points.length) continue;
      const colour = tenth.has(row.trial) ? ` c${tenth.get(row.trial)}` : "", open = counted.has(row.trial) ? "" : " open";
      const path = s("path", { class: `trial${colour}${open}`, d: `M${points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join("L")}` });
      lines.set(row.trial, { path, points });
      parts.push(path);
    }
    plot.replaceChildren(...parts, ...dimensions.flatMap((each, index) => axis(each, index, width)));
    filter();
    light(on);
  }

  function axis(each, index, width) {
    const last = index === dimensions.length - 1;
    const anchor = index === 0 ? "start" : last ? "end" : "middle", x = index === 0 ? 4 : last ? width - 4 : each.x;
    each.box = s("rect", { class: "brush", x: each.x - 8, width: 16, visibility: "hidden" });
    const strip = s("rect", { class: "strip", x: each.x - 12, y: TOP - 8, width: 24, height: BOTTOM - TOP + 16 },
      s("title", { text: `${each.key}: drag to filter, click to clear` }));
    strip.addEventListener("pointerdown", (event) => drag(strip, each, event));
    return [
      s("line", { class: "axis", x1: each.x, x2: each.x, y1: TOP, y2: BOTTOM }),
      s("text", { class: "label", x, y: 16, "text-anchor": anchor, text: short(each.key, 22) }),
      ...each.ticks.flatMap(([value, text]) => {
        const y = each.place(value);
        return [
          s("line", { class: "axis", x1: each.x - 4, x2: each.x, y1: y, y2: y }),
          s("text", { x: each.x - 7, y: y + 4, "text-anchor": "end", text: short(text, 12) }),
        ];
      }), each.box, strip,
    ];
  }

  function at(event) {
    const frame = plot.getBoundingClientRect(), scale = plot.viewBox.baseVal.width / frame.width;
    return [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
  }

  function drag(strip, each, down) {
    const start = at(down)[1];
    strip.setPointerCapture(down.pointerId);
    brushes.delete(each.key);
    const move = (event) => {
      const now = at(event)[1];
      if (Math.abs(now - start) < 3) brushes.delete(each.key);
      else brushes.set(each.key, [Math.min(start, now), Math.max(start, now)]);
      filter();
    };
    const end = () => {
      strip.removeEventListener("pointermove", move);
      filter();
    };
    strip.addEventListener("pointermove", move);
    strip.addEventListener("pointerup", end, { once: true });
    strip.addEventListener("pointercancel", end, { once: true });
  }

  function filter() {
    const active = dimensions.filter((each) => brushes.has(each.key));
    for (const each of dimensions) {
      const [top, bottom] = brushes.get(each.key) ?? [0, 0];
      each.box.setAttribute("visibility", brushes.has(each.key) ? "visible" : "hidden");
      each.box.setAttribute("y", top);
      each.box.setAttribute("height", bottom - top);
    }
    visible = new Set(trials.filter((row) => active.every((each) => {
      const value = each.get(row), [top, bottom] = brushes.get(each.key);
      return known(value) && each.place(value) >= top && each.place(value) <= bottom;
    })).map((row) => row.trial));
    for (const [trial, { path }] of lines) path.classList.toggle("out", !visible.has(trial));
    changed(visible, active.length > 0);
  }

  function light(trial) {
    lines.get(on)?.path.classList.remove("on");
    on = trial;
    lines.get(on)?.path.classList.add("on");
    lit(trial);
  }

  plot.addEventListener("pointermove", (event) => {
    if (event.buttons) return;
    const [x, y] = at(event);
    let found = null, distance = 8;
    for (const [trial, { points }] of lines) {
      const next = visible.has(trial) ? points.findIndex(([px]) => px >= x) : 0;
      if (next < 1) continue;
      const [[ax, ay], [bx, by]] = [points[next - 1], points[next]];
      const away = Math.abs(ay + ((x - ax) / (bx - ax)) * (by - ay) - y);
      if (away < distance) [distance, found] = [away, trial];
    }
    if (found !== on) light(found);
  });
  plot.addEventListener("pointerleave", () => light(null));
  el.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    const order = [...painted].reverse().filter((row) => visible.has(row.trial) && lines.has(row.trial));
    const now = order.findIndex((row) => row.trial === on);
    const row = order[Math.min(Math.max(now + by, 0), order.length - 1)];
    if (row) {
      light(row.trial);
      const params = Object.entries(row.params).map(([key, value]) => `${key} ${literal(value)}`).join(", ");
      announce(`trial ${row.trial}, ${row.state}, ${study.study.objective} ${literal(row.value)}, ${params}`);
    }
    event.preventDefault();
    event.stopPropagation();
  });
  const watched = onWidth(el, draw);
  return {
    el, light,
    reset: () => {
      brushes.clear();
      filter();
    },
    close: () => watched.disconnect(),
  };
}
