// How a run has spent its time: spans one after the other, and the shares of all of them.

import { announce, dataTable, h, onWidth, s, setText } from "./dom.js";
import { duration, moment, percent } from "./format.js";
import { times } from "./scales.js";

// In the order in which people look at them.
export const KINDS = {
  committed: "Training, committed", uncommitted: "Training since the last commit", checkpoint: "Held up by saves",
  lost: "Lost: done again or given up", hang: "No sign of life", import: "Start-up: imports", rendezvous: "Start-up: ranks meet",
  load: "Start-up: loading", idle: "Nodes held, idle", queue: "Waiting for nodes",
};
const SPAN_WORDS = { ...KINDS, train: "Training" };
const HEIGHT = 74, TOP = 8, LANE = 26;

export const hatches = () => s("svg", { width: 0, height: 0, class: "hidden", "aria-hidden": "true" }, s("defs", {},
  ["lost", "hang"].map((kind) => s("pattern", {
    id: `hatch-${kind}`, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: `rotate(${kind === "lost" ? 45 : -45})`,
  }, s("rect", { width: 5, height: 5, class: `hatch-${kind}-back` }), s("line", { x1: 0, y1: 0, x2: 0, y2: 5, class: `hatch-${kind}`, "stroke-width": 6 })))));

const swatch = (kind) => h("span", { class: `swatch k-${kind}`, "aria-hidden": "true" });

/** `update(spans, attempts, ongoing)` draws. */
export function timeline() {
  const said = h("span", { class: "chart-at" });
  const plot = s("svg", { class: "plot", "aria-hidden": "true" });
  const box = h("div", {
    class: "chart", tabindex: 0, role: "group", "aria-roledescription": "timeline",
    "aria-label": "Timeline of attempts. Left and right arrows move from span to span.",
  }, plot);
  const legend = h("ul", { class: "shares" });
  const table = dataTable("Timeline: data", () => ({
    head: ["from", "to", "for", "attempt", "what"], numeric: (index) => index === 2,
    rows: spans.map((span) => [
      moment(span.start), moment(span.end), duration(span.end - span.start), span.attempt === null ? "–" : String(span.attempt), SPAN_WORDS[span.kind] ?? span.kind,
    ]),
  }));
  const el = h("section", { class: "panel", "aria-label": "Timeline" },
    h("div", { class: "panel-head" }, h("h2", { text: "Timeline" }), said), box, legend, table.el);
  let spans = [], attempts = [], at = null, rects = [];

  function words(span) {
    const attempt = span.attempt === null || span.attempt === undefined ? "" : `, attempt ${span.attempt}`;
    return `${SPAN_WORDS[span.kind] ?? span.kind}, ${duration(span.end - span.start)}${attempt}, from ${moment(span.start)}`;
  }

  function draw() {
    const width = Math.max(box.clientWidth || 600, 240);
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!spans.length) {
      plot.replaceChildren(s("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", text: "nothing has happened yet" }));
      return;
    }
    const scale = times(spans[0].start, spans.at(-1).end, 1, width - 1, width < 600 ? 4 : 8);
    rects = spans.map((span, index) => {
      const x = scale.place(span.start);
      const rect = s("rect", {
        class: `span k-${Object.hasOwn(SPAN_WORDS, span.kind) ? span.kind : "idle"}`, x, y: TOP, width: Math.max(scale.place(span.end) - x, 1), height: LANE,
      }, s("title", { text: words(span) }));
      rect.addEventListener("pointerenter", () => go(index, false));
      return rect;
    });
    const marks = [];
    let free = -Infinity;
    for (const attempt of attempts) {
      const own = spans.filter((span) => span.attempt === attempt.number);
      if (!own.length) continue;
      const x = scale.place(own[0].start), end = scale.place(own.at(-1).end), y = TOP + LANE + 4;
      marks.push(s("path", { class: "attempt-mark", fill: "none", d: `M${x},${y}v4H${Math.max(end - 1, x)}v-4` }));
      const text = `${attempt.number}: ${attempt.reason || attempt.state}`;
      const need = text.length * 6.2 + 8;
      if (x < free || need > end - x + 14) continue;
      marks.push(s("text", { x: Math.min(Math.max((x + end) / 2, need / 2), width - need / 2), y: y + 17, "text-anchor": "middle", text }));
      free = x + need;
    }
    const ticks = scale.ticks.map(([value, text]) => {
      const x = scale.place(value);
      return s("text", { x: Math.min(Math.max(x, 16), width - 16), y: HEIGHT - 4, "text-anchor": "middle", text });
    });
    plot.replaceChildren(...rects, ...marks, ...ticks);
    if (at !== null) go(at, false);
  }

  function go(index, aloud) {
    rects[at]?.classList.remove("on");
    at = index;
    if (index === null) {
      setText(said, "");
      return;
    }
    at = Math.min(Math.max(index, 0), spans.length - 1);
    rects[at].classList.add("on");
    setText(said, words(spans[at]));
    if (aloud) announce(words(spans[at]));
  }

  box.addEventListener("pointerleave", () => go(null, false));
  box.addEventListener("blur", () => go(null, false));
  box.addEventListener("keydown", (event) => {
    if (!spans.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const last = spans.length - 1;
    const to = { ArrowLeft: at === null ? last : at - 1, ArrowRight: at === null ? 0 : at + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape" && at !== null) go(null, false);
    else if (to === undefined) return;
    else go(to, true);
    event.preventDefault();
    event.stopPropagation();
  });
  const watched = onWidth(box, draw);

  return {
    el,
    update(nextSpans, nextAttempts, shares) {
      spans = nextSpans;
      attempts = nextAttempts;
      if (at !== null && at >= spans.length) at = null;
      const seconds = {};
      for (const span of spans) {
        const kind = span.kind === "train" ? "committed" : span.kind;
        seconds[kind] = (seconds[kind] ?? 0) + span.end - span.start;
      }
      const kinds = Object.keys(KINDS).filter((kind) => seconds[kind] || shares?.[kind]);
      const total = Object.values(seconds).reduce((sum, each) => sum + each, 0);
      legend.replaceChildren(...kinds.map((kind) => {
        const part = shares?.[kind] ?? (total ? (seconds[kind] ?? 0) / total : 0);
        return h("li", {}, swatch(kind), h("span", { text: KINDS[kind] }),
          h("span", { class: "number soft", text: duration(part * total) }), h("span", { class: "number", text: percent(part, part && part < 0.1 ? 1 : 0) }));
      }));
      draw();
      table.refresh();
    },
    close: () => watched.disconnect(),
  };
}

/** A bar of shares that sum to one, with a legend where `legend` says so. */
export function shareBar(shares, legend = true) {
  const kinds = Object.keys(KINDS).filter((kind) => shares[kind] > 0);
  const parts = kinds.map((kind) => {
    const part = h("span", { class: `k-${kind}`, title: `${KINDS[kind]}: ${percent(shares[kind], 1)}` });
    part.style.flexGrow = String(shares[kind]);
    return part;
  });
  const bar = h("div", { class: "sharebar", "aria-hidden": "true" }, parts);
  if (!legend) return bar;
  return h("div", {}, bar, h("ul", { class: "shares" }, kinds.map((kind) => h("li", {}, swatch(kind), h("span", { text: KINDS[kind] }),
    h("span"), h("span", { class: "number", text: percent(shares[kind], 1) })))));
}
