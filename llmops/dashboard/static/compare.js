// Curves of several runs over one another.

import { get } from "./api.js";
import { badge, note, pageOf } from "./cells.js";
import { LINES, lineChart, pointsOf } from "./chart.js";
import { fillTable, h, setText } from "./dom.js";
import { compact, count, figure, number, percent } from "./format.js";
import { store, subscribe } from "./store.js";

const PAUSE_MS = 4000; // between two readings of the curves, at least
const PLOTS = [["Loss", "loss", number], ["Tokens/s", "tokens_per_s", compact], ["MFU", "mfu", (value) => percent(value, 1)]];
const kept = { x: "step", log: false, smooth: 0 };

export function showCompare(main, { query }) {
  const ids = [...new Set((query.get("ids") ?? "").split(",").filter(Boolean).map(decodeURIComponent))];
  const x = h("select", { id: "x" }, [["step", "step"], ["elapsed", "time since start"], ["clock", "wall time"]].map(
    ([value, text]) => h("option", { value, text }),
  ));
  x.value = kept.x;
  const log = h("input", { type: "checkbox", id: "log" });
  log.checked = kept.log;
  const smooth = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, id: "smooth" });
  smooth.value = kept.smooth;
  const smoothText = h("span", { class: "number" });
  const trouble = h("div", { class: "note bad", role: "alert", hidden: true });
  const charts = PLOTS.map(([title, , format]) => lineChart(title, format));
  const table = h("table", { "aria-label": "Chosen runs" }, h("thead"), h("tbody"));
  main.append(
    h("a", { class: "back", href: "#/", text: "← Runs" }),
    h("div", { class: "page-head" }, h("h1", { text: ids.length === 1 ? "Curves of 1 run" : `Compare ${ids.length} runs` }), h("div", { class: "tools" },
      h("label", { class: "field" }, "Over", x), h("label", { class: "field" }, log, "log loss"),
      h("label", { class: "field" }, "Smoothing", smooth, smoothText))),
    h("div", { class: "stack" }, trouble, charts[0].el, h("div", { class: "charts" }, charts.slice(1).map((chart) => chart.el)),
      h("section", { class: "panel scroll", "aria-label": "Chosen runs" }, table)),
  );
  let runs = [], reading = false, again = false, closed = false, timer = null;

  function draw() {
    Object.assign(kept, { x: x.value, log: log.checked, smooth: Number(smooth.value) });
    setText(smoothText, kept.smooth ? kept.smooth.toFixed(2) : "off");
    const starts = runs.map((run) => run.series.time?.find((time) => time !== null)).filter((time) => time !== undefined);
    const origin = kept.x === "clock" && starts.length ? Math.min(...starts) : null;
    PLOTS.forEach(([, key], index) => charts[index].update({
      x: kept.x === "step" ? "step" : "seconds", log: kept.log && key === "loss", smooth: kept.smooth,
      lines: runs.map((run) => ({
        id: run.id, name: names().get(run.id), style: ids.indexOf(run.id) % LINES,
        points: pointsOf(run.series, key, kept.x, origin),
      })),
    }));
    facts();
  }

  /** A name that is not alone takes the end of its id. */
  function names() {
    const tally = new Map();
    for (const run of runs) tally.set(run.name, (tally.get(run.name) ?? 0) + 1);
    return new Map(runs.map((run) => [run.id, tally.get(run.name) > 1 ? `${run.name} ${run.id.slice(-4)}` : run.name]));
  }

  function facts() {
    fillTable(table, {
      head: ["Run", "State", "Step", "Loss", "Tokens/s", "MFU", "Goodput", h("span", { class: "hidden", text: "Remove" })], numeric: (index) => index > 1 && index < 7,
      rows: ids.map((id) => {
        const row = store.rows.get(id) ?? { id, name: runs.find((run) => run.id === id)?.name ?? id, state: null };
        const rest = ids.filter((other) => other !== id);
        const remove = rest.length ? h("a", {
          href: `#/compare?ids=${rest.map(encodeURIComponent).join(",")}`, text: "Remove", "aria-label": `Remove ${row.name}`,
        }) : "";
        return [
          h("a", { href: pageOf(row), text: row.name }), row.state ? badge(row.state) : "–", count(row.step), figure(row.loss),
          compact(row.tokens_per_s), percent(row.mfu, 1), percent(row.goodput), remove,
        ];
      }),
    });
  }

  async function read() {
    if (reading || !ids.length) {
      again = reading;
      return;
    }
    reading = true;
    try {
      const found = await get(`api/series?ids=${ids.map(encodeURIComponent).join(",")}`);
      if (closed) return;
      runs = found.runs;
      const problems = runs.flatMap((run) => run.series.problems ?? []);
      setText(trouble, problems.join(" · "));
      trouble.hidden = !problems.length;
      draw();
    } catch (error) {
      setText(trouble, error.message);
      trouble.hidden = false;
      again ||= error.status === 504;
    } finally {
      reading = false;
      timer = setTimeout(() => {
        timer = null;
        if (again && !closed) read();
        again = false;
      }, PAUSE_MS);
    }
  }

  for (const control of [x, log, smooth]) control.addEventListener("input", draw);
  const leave = subscribe((changed) => {
    if (!ids.some((id) => changed.has(id))) return;
    facts();
    if (timer) again = true;
    else read();
  });
  if (ids.length) {
    facts();
    read();
  } else main.append(note("", "No runs are chosen. Choose some in the list of runs."));
  return {
    title: "Compare",
    close: () => {
      closed = true;
      leave();
      clearTimeout(timer);
      for (const chart of charts) chart.close();
    },
  };
}
