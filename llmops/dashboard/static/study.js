// A sweep: what its trials were, and what became of them.

import { get } from "./api.js";
import { badge, facts, panel } from "./cells.js";
import { h, setText } from "./dom.js";
import { duration, figure, known, literal, number, percent } from "./format.js";
import { parallel } from "./parallel.js";
import { store, subscribe } from "./store.js";

const PAUSE_MS = 10000; // between two readings, at least: the server keeps an answer as long

function compare(a, b) {
  if (!known(a) || !known(b)) return known(a) ? -1 : known(b) ? 1 : 0;
  return typeof a === "number" && typeof b === "number" ? a - b : literal(a).localeCompare(literal(b), undefined, { numeric: true });
}

export function showStudy(main, { id }) {
  const heading = h("h1", { text: store.rows.get(id)?.name ?? id });
  const state = h("span"), about = h("p", { class: "soft" });
  const waiting = h("p", { class: "empty", text: "Reading the study…" });
  const content = h("div", { class: "stack", hidden: true });
  main.append(
    h("a", { class: "back", href: "#/", text: "← Runs" }),
    h("div", { class: "page-head" }, h("div", {}, h("div", { class: "headline" }, heading, state), about)), waiting, content,
  );
  const sort = { index: 0, sign: 1 };
  let plot = null, closed = false, timer = null, again = false, seen = "";

  function draw(data) {
    const { study, trials } = data;
    setText(heading, study.name);
    document.title = `${study.name} – llmops`;
    const tally = new Map();
    for (const row of trials) tally.set(row.state, (tally.get(row.state) ?? 0) + 1);
    const states = [...tally].sort((a, b) => b[1] - a[1]).map(([name, count]) => `${count} ${name}`).join(", ");
    setText(about, [study.id, study.pruner === "none" ? study.sampler : `${study.sampler} with ${study.pruner}`,
      `${study.direction} ${study.objective}`, states || "no trials"].join(" · "));
    plot?.close();
    const shown = h("span", { class: "soft number", role: "status" });
    const reset = h("button", { type: "button", class: "plain", text: "Reset filters", disabled: true, onclick: () => plot.reset() });
    const details = h("p", { class: "soft", id: "details" }, "\u00a0");
    const rows = new Map();
    const byTrial = new Map(trials.map((row) => [row.trial, row]));
    let lit = null;
    plot = parallel(data, {
      changed(visible, active) {
        setText(shown, `${visible.size} of ${trials.length} trials`);
        reset.disabled = !active;
        for (const [trial, tr] of rows) tr.hidden = !visible.has(trial);
      },
      lit(trial) {
        rows.get(lit)?.classList.remove("lit");
        lit = trial;
        rows.get(lit)?.classList.add("lit");
        const row = byTrial.get(trial);
        const params = row ? data.axes.map((axis) => `${axis.key}=${literal(row.params[axis.key])}`).join("  ") : "";
        setText(details, row ? `trial ${trial}  ${row.state}  ${literal(row.value)}  ${params}` : "\u00a0");
      },
    });
    const coordinates = panel("Parameters and objective", plot.el, details);
    coordinates.head.append(
      h("span", { class: "ramp-legend", "aria-hidden": "true" }, "best", h("span", { class: "ramp" }), "worst"),
      h("span", { class: "soft", text: "drag along an axis to filter" }), h("div", { class: "tools" }, shown, reset),
    );
    const best = data.best && byTrial.get(data.best.trial);
    const top = panel("Best so far", best ? h("div", {}, facts([
      [study.objective, number(best.value), true], ["Trial", h("a", { href: `#/run/${encodeURIComponent(best.id)}`, text: String(best.trial) }), true],
          ]), h("p", {}, h("code", { text: data.best.overrides.join(" ") }))) : h("p", { class: "soft", text: "No trial has a value yet." }));
    content.replaceChildren(top.el, coordinates.el, importance(data), table(data, rows));
  }

  function importance(data) {
    const entries = Object.entries(data.importance);
    const why = data.importanceKnown ? "Needs four complete trials that differ." : "Needs Optuna where the dashboard runs: pip install 'llmops[sweep]'";
    return panel("Importance of parameters", entries.length ? h("dl", { class: "importance" }, entries.flatMap(([key, share]) => {
      const bar = h("div", { class: "share" });
      bar.style.width = percent(share, 1).replace(" ", "");
      return [h("dt", { text: key }), h("dd", { "aria-hidden": "true" }, bar), h("dd", { class: "number", text: percent(share) })];
    })) : h("p", { class: "soft", text: why })).el;
  }

  function table(data, rows) {
    const columns = [
      ["Trial", (row) => row.trial], ["State", (row) => row.state], [data.study.objective, (row) => row.value], ["Step", (row) => row.step],
      ...data.axes.map((axis) => [axis.key, (row) => row.params[axis.key]]), ["Ran for", (row) => row.seconds || null], ["Why", (row) => row.reason || null],
    ].filter(([title, value]) => title !== "Why" || data.trials.some((row) => known(value(row))));
    const numeric = columns.map(([, value], index) => index > 0 && data.trials.every((row) => !known(value(row)) || typeof value(row) === "number"));
    const head = h("tr"), body = h("tbody");
    const heads = columns.map(([title], index) => {
      const th = h("th", { scope: "col", class: numeric[index] ? "number" : null, "aria-sort": "none" });
      th.append(h("button", { type: "button", text: title, onclick: () => {
        Object.assign(sort, { sign: sort.index === index ? -sort.sign : 1, index });
        arrange();
      } }));
      head.append(th);
      return th;
    });
    for (const row of data.trials) {
      const tr = h("tr", { class: data.best?.trial === row.trial ? "best" : null }, columns.map(([title, value], index) => {
        if (index === 0) return h("th", { scope: "row" }, h("a", { href: `#/run/${encodeURIComponent(row.id)}`, text: String(row.trial) }));
        if (index === 1) return h("td", {}, badge(row.state));
        return h("td", { class: numeric[index] ? "number" : null, text: title === "Ran for" ? duration(value(row)) : index === 2 ? figure(value(row)) : literal(value(row)) });
      }));
      tr.addEventListener("pointerenter", () => plot.light(row.trial));
      tr.addEventListener("pointerleave", () => plot.light(null));
      rows.set(row.trial, tr);
    }
    function arrange() {
      const [, value] = columns[sort.index] ?? columns[0];
      const ordered = [...data.trials].sort((a, b) => (known(value(a)) && known(value(b)) ? sort.sign : 1) * compare(value(a), value(b)) || a.trial - b.trial);
      body.append(...ordered.map((row) => rows.get(row.trial)));
      heads.forEach((th, index) => th.setAttribute("aria-sort", index !== sort.index ? "none" : sort.sign > 0 ? "ascending" : "descending"));
    }
    arrange();
    return panel("Trials", h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Trials: table" },
      h("table", { id: "trials", "aria-label": "Trials" }, h("thead", {}, head), body))).el;
  }

  async function read() {
    timer = setTimeout(() => {
      timer = null;
      if (again) read();
      again = false;
    }, PAUSE_MS);
    try {
      const data = await get(`api/study/${encodeURIComponent(id)}`);
      const text = JSON.stringify(data);
      if (closed || text === seen) return;
      seen = text;
      waiting.hidden = true;
      content.hidden = false;
      draw(data);
    } catch (error) {
      if (closed) return;
      waiting.hidden = false;
      setText(waiting, error.message);
      again ||= [0, 502, 504].includes(error.status);
    }
  }

  function glance() {
    const row = store.rows.get(id);
    if (row) state.replaceChildren(badge(row.state));
  }
  const leave = subscribe((changed) => {
    if (!changed.has(id)) return;
    glance();
    if (timer) again = true;
    else read();
  });
  glance();
  read();
  return {
    title: heading.textContent,
    close: () => {
      closed = true;
      leave();
      clearTimeout(timer);
      plot?.close();
    },
  };
}
