// Small pieces that several pages show.

import { h, s } from "./dom.js";
import { known } from "./format.js";

const SIGNS = {
  running: "▶", pending: "○", preempted: "◐", finished: "✓", failed: "✕", cancelled: "⊘", unknown: "?", lost: "✕",
  complete: "✓", pruned: "⊘", nan: "✕", timeout: "◷",
};
export const OVER = new Set(["finished", "failed", "cancelled"]);

/** A state, told by its word, its sign and its colour. */
export function badge(state) {
  const name = Object.hasOwn(SIGNS, state) ? state : "unknown";
  return h("span", { class: `state-badge s-${name}` }, h("i", { "aria-hidden": "true", text: SIGNS[name] }), state);
}

export const stateClass = (state) => `s-${Object.hasOwn(SIGNS, state) ? state : "unknown"}`;

export const pageOf = (row) => `#/${row.kind === "study" || row.trials ? "study" : "run"}/${encodeURIComponent(row.id)}`;

/** The shape of the last losses; nothing for fewer than two. */
export function spark(values) {
  const finite = values.filter((value) => typeof value === "number");
  if (finite.length < 2) return h("span", { class: "spark" });
  const low = Math.min(...finite), high = Math.max(...finite), span = high - low || 1;
  const place = (value, index) =>
    `${((index / (finite.length - 1)) * 70 + 1).toFixed(1)},${(18 - ((value - low) / span) * 16).toFixed(1)}`;
  const path = s("path", { d: `M${finite.map(place).join("L")}` });
  return s("svg", { class: "spark", viewBox: "0 0 72 20", preserveAspectRatio: "none", "aria-hidden": "true" }, path);
}

export function bar(share, state) {
  const done = h("span");
  done.style.width = `${(Math.min(Math.max(share, 0), 1) * 100).toFixed(1)}%`;
  return h("span", { class: `bar ${stateClass(state)}`, "aria-hidden": "true" }, done);
}

/** Terms with their values; an entry without one is left out. */
export function facts(entries, className = "facts") {
  return h("dl", { class: className }, entries.filter(([, value]) => known(value) && value !== "").map(
    ([term, value, big]) => h("div", {}, h("dt", { text: term }), h("dd", { class: big ? "big" : null }, value)),
  ));
}

export function panel(title, ...children) {
  const heading = h("h2", { text: title });
  const head = h("div", { class: "panel-head" }, heading);
  const el = h("section", { class: "panel", "aria-label": title }, head, ...children);
  return { el, head };
}

export const note = (kind, text, detail) =>
  h("div", { class: `note ${kind}` }, text, detail ? h("pre", { text: detail, tabindex: 0, role: "region", "aria-label": text }) : null);
