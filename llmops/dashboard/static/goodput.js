// Where the node-hours went, by week.

import { get } from "./api.js";
import { facts, panel } from "./cells.js";
import { announce, dataTable, h, onWidth, s, setText } from "./dom.js";
import { compact, count, number, percent } from "./format.js";
import { numbers } from "./scales.js";
import { KINDS, hatches, shareBar } from "./timeline.js";

const HEIGHT = 300, LEFT = 54, RIGHT = 8, TOP = 12, BOTTOM = 26;
const RETRY_MS = 5000, AGAIN_MS = 60000;
const kept = { unit: "hours" };

const hours = (value) => (value >= 1000 ? compact(value) : number(value, 3));

export function showGoodput(main) {
  const unit = h("select", { id: "unit" }, h("option", { value: "hours", text: "node-hours" }), h("option", { value: "shares", text: "shares" }));
  unit.value = kept.unit;
  const said = h("span", { class: "chart-at" });
  const plot = s("svg", { class: "plot", "aria-hidden": "true" });
  const box = h("div", {
    class: "chart", tabindex: 0, role: "group", "aria-roledescription": "chart",
    "aria-label": "Goodput by week. Left and right arrows move from week to week.",
  }, plot);
  const total = h("div");
  let weeks = [], at = null, timer = null, closed = false, bars = [];
  const table = dataTable("Goodput by week: data", () => ({
    head: ["week", "runs", "node-hours", "goodput", ...Object.keys(KINDS)],
    rows: weeks.map((each) => [each.name, count(each.runs), hours(each.node_hours), percent(each.goodput, 1), ...Object.keys(KINDS).map((kind) => percent(each.shares[kind] ?? 0, 1))]),
  }));
  const waiting = h("p", { class: "empty", text: "Reading all runs…" });
  const chart = panel("By week", box, table.el);
  chart.head.append(said, h("div", { class: "tools" }, h("label", { class: "field" }, "Height", unit)));
  const content = h("div", { class: "stack", hidden: true }, total, chart.el);
  main.append(hatches(), h("div", { class: "page-head" }, h("h1", { text: "Goodput" }),
    h("p", { class: "soft", text: "The share of node-hours that became committed progress, and where the rest went." })), waiting, content);

  function draw() {
    kept.unit = unit.value;
    const width = Math.max(box.clientWidth || 600, 240), whole = kept.unit === "shares";
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const y = numbers([0, ...weeks.map((each) => (whole ? 1 : each.node_hours))], false, HEIGHT - BOTTOM, TOP, whole ? percent : hours);
    const step = (width - LEFT - RIGHT) / Math.max(weeks.length, 4), gap = Math.min(step * 0.25, 18);
    const parts = y.ticks.flatMap(([value, text]) => [
      s("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.place(value), y2: y.place(value) }),
      s("text", { x: LEFT - 7, y: y.place(value) + 4, "text-anchor": "end", text }),
    ]);
    const every = Math.ceil(64 / step);
    bars = weeks.map((each, index) => {
      const x = LEFT + index * step + gap / 2, wide = Math.min(step - gap, 90), group = s("g", { class: "week" });
      let sum = 0;
      for (const kind of Object.keys(KINDS)) {
        const share = (each.shares[kind] ?? 0) * (whole ? 1 : each.node_hours);
        if (share <= 0) continue;
        const bottom = y.place(sum), top = y.place(sum + share);
        group.append(s("rect", { class: `span k-${kind}`, x, y: top, width: wide, height: Math.max(bottom - top - 0.5, 0.5) },
          s("title", { text: `${each.name}, ${KINDS[kind]}: ${percent(each.shares[kind], 1)}` })));
        sum += share;
      }
      group.addEventListener("pointerenter", () => go(index, false));
      parts.push(group);
      if (index % every === 0) parts.push(s("text", { x: x + wide / 2, y: HEIGHT - 8, "text-anchor": "middle", text: each.name.replace(/^\d+-/, "") }));
      return { x, wide };
    });
    plot.replaceChildren(...parts);
    if (at !== null) go(at, false);
  }

  function words(week) {
    const most = Object.entries(week.shares).filter(([kind, share]) => kind !== "committed" && share > 0.005).sort((a, b) => b[1] - a[1]).slice(0, 3);
    return [`${week.name}: ${hours(week.node_hours)} node-hours, goodput ${percent(week.goodput, 1)}`, ...most.map(([kind, share]) => `${kind} ${percent(share, 1)}`)].join(", ");
  }

  function go(index, aloud) {
    plot.querySelector(".cursor")?.remove();
    at = index === null ? null : Math.min(Math.max(index, 0), weeks.length - 1);
    setText(said, at === null ? "" : words(weeks[at]));
    if (at === null) return;
    const { x, wide } = bars[at];
    plot.append(s("rect", { class: "cursor", fill: "none", x: x - 3, y: TOP - 4, width: wide + 6, height: HEIGHT - TOP - BOTTOM + 8 }));
    if (aloud) announce(words(weeks[at]));
  }

  async function read() {
    let pause = AGAIN_MS;
    try {
      const found = await get("api/goodput");
      if (closed) return;
      weeks = found.groups;
      waiting.hidden = weeks.length > 0;
      content.hidden = weeks.length === 0;
      setText(waiting, "No run has spent any time yet.");
      const summary = panel("All runs and trials", facts([
        ["Goodput", percent(found.total.goodput, 1), true], ["Node-hours", hours(found.total.node_hours), true],
        ["Rank-hours", hours(found.total.rank_hours), true], ["Runs", count(found.total.runs), true],
      ]), shareBar(found.total.shares));
      total.replaceChildren(summary.el);
      draw();
      table.refresh();
    } catch (error) {
      if (closed) return;
      if (!weeks.length) setText(waiting, error.status === 504 ? "Reading all runs; this takes a while the first time…" : error.message);
      pause = RETRY_MS;
    }
    timer = setTimeout(read, pause);
  }

  unit.addEventListener("change", draw);
  box.addEventListener("pointerleave", () => go(null, false));
  box.addEventListener("blur", () => go(null, false));
  box.addEventListener("keydown", (event) => {
    if (!weeks.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const last = weeks.length - 1;
    const to = { ArrowLeft: at === null ? last : at - 1, ArrowRight: at === null ? 0 : at + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    go(to, true);
    event.preventDefault();
    event.stopPropagation();
  });
  const watched = onWidth(box, draw);
  read();
  return {
    title: "Goodput",
    close: () => {
      closed = true;
      clearTimeout(timer);
      watched.disconnect();
    },
  };
}
