// All about one run.

import { get, post } from "./api.js";
import { OVER, badge, facts, note, panel } from "./cells.js";
import { LINES, lineChart, pointsOf } from "./chart.js";
import { announce, confirmed, fillTable, h, setText } from "./dom.js";
import { bytes, compact, count, duration, known, literal, moment, number, percent } from "./format.js";
import { logView } from "./logs.js";
import { store, subscribe } from "./store.js";
import { hatches, timeline } from "./timeline.js";

const PAUSE_MS = 4000; // between two readings, at least

function tablePanel(title, head, numeric) {
  const table = h("table", { "aria-label": title }, h("thead"), h("tbody"));
  const { el } = panel(title, h("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": `${title}: table` }, table));
  return { el, fill: (rows) => { el.hidden = !rows.length; fillTable(table, { head, rows, numeric }); } };
}

/** An attempt that failed, of a run that went on. */
function earlier(error) {
  const text = "An earlier attempt failed; what it printed last";
  return h("details", { class: "note" }, h("summary", { text }), h("pre", { text: error, tabindex: 0, role: "region", "aria-label": text }));
}

export function showRun(main, { id, about }) {
  const heading = h("h1", { text: store.rows.get(id)?.name ?? id });
  const state = h("span"), actions = h("div", { class: "actions" }), reason = h("p", { class: "soft" });
  const notes = h("div", { class: "stack" }), numbers = h("div", { class: "panel" });
  const loss = lineChart("Loss"), speed = lineChart("Tokens/s", compact);
  const mfu = lineChart("MFU", (value) => percent(value, 1)), norm = lineChart("Gradient norm");
  const line = timeline(), log = logView(id);
  const attempts = tablePanel("Attempts", ["Attempt", "State", "Why", "Steps", "Resumed from", "Hosts", "Started", "For"], (index) => [3, 4, 7].includes(index));
  const commits = tablePanel("Checkpoints", ["Step", "Saved", "Size", "Path"], (index) => index === 2);
  const scored = lineChart("Scores"), scores = tablePanel("Scores by step", ["Task", "Metric", "Step", "Score", "± standard error", "When"], (index) => [2, 3, 4].includes(index));
  const changes = tablePanel("Changes of configuration", ["Key", "Before", "After", "Submission"], (index) => index === 3);
  const rest = h("div", { class: "stack", hidden: true }, numbers, h("div", { class: "charts four" }, loss.el, speed.el, mfu.el, norm.el), line.el, h("div", { class: "charts" }, scored.el), scores.el, attempts.el,
    log.el, h("div", { class: "charts" }, commits.el, changes.el));
  const waiting = h("p", { class: "empty", text: "Reading the run…" });
  const parent = h("a", { class: "back", href: "#/", text: "← Runs" });
  main.append(
    hatches(), parent, h("div", { class: "page-head" }, h("div", {}, h("div", { class: "headline" }, heading, state), reason), actions),
    h("div", { class: "stack" }, notes, waiting, rest),
  );
  let reading = false, again = false, closed = false, timer = null, started = false, charted = null;
  const log10 = h("input", { type: "checkbox", onchange: () => charted && draw(charted) });
  loss.head.append(h("div", { class: "tools" }, h("label", { class: "field" }, log10, "log")));

  function draw(run) {
    setText(heading, run.name);
    document.title = `${run.name} – llmops`;
    state.replaceChildren(badge(run.state));
    setText(reason, [run.reason, run.phase].filter(Boolean).join(" · "));
    if (run.parent) {
      parent.href = `#/study/${encodeURIComponent(run.parent)}`;
      parent.textContent = "← Study";
    }
    const told = [];
    if (known(run.stalled_s)) told.push(note("warn", `No step for ${duration(run.stalled_s)}: the run may hang.`));
    if (run.error && run.state === "failed") told.push(note("bad", "What it printed last:", run.error));
    else if (run.error) told.push(earlier(run.error));
    for (const problem of run.problems ?? []) told.push(note("warn", problem));
    const open = notes.querySelector("details")?.open;
    notes.replaceChildren(...told);
    if (open && notes.querySelector("details")) notes.querySelector("details").open = true;
    const now = OVER.has(run.state) && known(run.ended) ? run.ended : store.now();
    const left = run.last_commit;
    numbers.replaceChildren(facts([
      ["Step", run.max_steps ? `${count(run.step)} / ${count(run.max_steps)}` : count(run.step), true],
      ["Loss", known(run.loss) ? number(run.loss) : null, true], ["Tokens/s", known(run.tokens_per_s) ? compact(run.tokens_per_s) : null, true],
      ["MFU", known(run.mfu) ? percent(run.mfu, 1) : null, true], ["Goodput", known(run.goodput) ? percent(run.goodput, 1) : null, true],
      ["ETA", known(run.eta_s) ? duration(run.eta_s) : null, true],
      ["Last commit", left ? `step ${count(left.step)}, ${duration(store.now() - left.time)} ago` : null],
      ["Elapsed", known(run.created) ? duration(now - run.created) : null],
      ["Node-hours", known(run.node_hours) ? number(run.node_hours, 3) : null],
      ["Where", [run.backend, run.job_ids?.at(-1)].filter(Boolean).join(" ")],
      ["Size", known(run.nodes) ? `${count(run.nodes)} nodes × ${count(run.ranks_per_node)} ranks` : null],
      ["Owner", run.owner], ["Submitted", known(run.created) ? moment(run.created) : null],
    ]), h("details", {}, h("summary", { text: "Identity" }), facts([
      ["Id", h("code", { text: run.id })], ["Folder", h("code", { text: run.url })], ["Jobs", (run.job_ids ?? []).join(", ")],
      ...Object.entries(run.params ?? {}).map(([key, value]) => [key, literal(value)]),
    ], "facts small")));
    const series = run.series ?? {};
    charted = run;
    const evals = (run.evals ?? []).map((each) => [each.step, each.loss]);
    loss.update({ log: log10.checked, lines: [
      { id: "train", name: "training", style: 0, points: pointsOf(series, "loss") },
      ...(evals.length ? [{ id: "eval", name: "held out", style: 1, points: evals, dots: true }] : []),
    ] });
    for (const [chart, key, name] of [[speed, "tokens_per_s", "tokens/s"], [mfu, "mfu", "MFU"], [norm, "grad_norm", "norm"]]) {
      const points = pointsOf(series, key);
      chart.el.hidden = !points.some((point) => point[1] !== null);
      chart.update({ lines: [{ id: key, name, style: 0, points }] });
    }
    drawScores(run.scores ?? []);
    loss.el.hidden = run.kind === "command" && !(series.step ?? []).length;
    line.update(run.timeline ?? [], run.attempts, run.goodput_shares);
    attempts.fill([...run.attempts].reverse().map((each) => [
      String(each.number), badge(each.state), each.why || each.detail || "–",
      known(each.last_step) ? `${count(each.first_step)}–${count(each.last_step)}` : "–", each.resume_step ? count(each.resume_step) : "–",
      h("span", { title: each.hosts.join(", "), text: each.hosts.length > 2 ? `${each.hosts[0]} and ${each.hosts.length - 1} more` : each.hosts.join(", ") }),
      moment(each.started), duration((each.ended ?? (each.state === "running" ? store.now() : each.started)) - each.started),
    ]));
    commits.fill((run.checkpoints ?? []).map((each) => [count(each.step), moment(each.time), each.problem ?? bytes(each.bytes), h("code", { text: each.path })]));
    changes.fill((run.config_changes ?? []).map((each) => [h("code", { text: each.key }), literal(each.old), literal(each.new), String(each.submission)]));
    log.update(run);
    if (about.actions) act(run);
    if (!started) {
      started = true;
      log.start();
    }
  }

  /** Scores that are shares, where higher is better, share one scale; the table has all of them, the newest first. */
  function drawScores(found) {
    const lines = new Map();
    for (const each of found) {
      if (each.higher_is_better !== true || !known(each.value) || each.value > 1) continue;
      const name = `${each.task} ${each.metric}`;
      if (!lines.has(name)) lines.set(name, []);
      lines.get(name).push([each.step, each.value]);
    }
    scored.el.hidden = !lines.size;
    scored.update({ lines: [...lines].map(([name, points], style) => ({ id: name, name, style: style % LINES, points, dots: true })) });
    scores.fill([...found].reverse().map((each) => [
      each.task, each.metric, count(each.step), known(each.value) ? number(each.value) : "–", known(each.stderr) ? number(each.stderr) : "–", moment(each.time),
    ]));
  }

  function act(run) {
    const over = OVER.has(run.state);
    const button = (text, kind, work) => h("button", { type: "button", class: kind, text, onclick: work });
    if (actions.dataset.over === String(over)) return;
    actions.dataset.over = String(over);
    actions.replaceChildren(...(over ? [button("Resume", "plain", () => perform(
      "resume", {}, `Resume ${run.name}?`, "It is submitted again, and goes on from its last committed step.", "Resume",
    ))] : [
      button("Save and cancel", "plain", () => perform(
        "cancel", { graceful: true }, `Save and cancel ${run.name}?`, "It saves a checkpoint and ends for good.", "Save and cancel",
      )),
      button("Cancel", "danger", () => perform(
        "cancel", { graceful: false }, `Cancel ${run.name}?`, "It ends for good, without saving: work since its last commit is lost.", "Cancel the run",
      )),
    ]));
  }

  async function perform(what, body, title, text, yes) {
    if (!await confirmed(title, text, yes)) return;
    for (const button of actions.children) button.disabled = true;
    try {
      const { done } = await post(`api/run/${encodeURIComponent(id)}/${what}`, body);
      announce(done);
      actions.replaceChildren(h("span", { class: "soft", text: done }));
    } catch (error) {
      actions.replaceChildren(h("span", { class: "bad", role: "alert", text: error.message }));
    }
    delete actions.dataset.over;
    read();
  }

  async function read() {
    if (reading) {
      again = true;
      return;
    }
    reading = true;
    clearTimeout(timer);
    try {
      const run = await get(`api/run/${encodeURIComponent(id)}`);
      if (closed) return;
      waiting.hidden = true;
      rest.hidden = false;
      draw(run);
    } catch (error) {
      if (closed) return;
      if (!started) setText(waiting, error.message);
      else notes.replaceChildren(note("warn", `Not up to date: ${error.message}`));
      again ||= error.status === 504 || error.status === 0 || error.status === 502;
    } finally {
      reading = false;
      timer = setTimeout(() => {
        timer = null;
        if (again && !closed) read();
        again = false;
      }, PAUSE_MS);
    }
  }

  const leave = subscribe((changed) => {
    if (!changed.has(id)) return;
    if (timer) again = true;
    else read();
  });
  // A trial is not in the list, whose changes tell of all other runs.
  const trial = setInterval(() => { if (started && !store.rows.has(id) && !document.hidden) read(); }, 2 * PAUSE_MS);
  read();
  return {
    title: heading.textContent,
    close: () => {
      closed = true;
      leave();
      clearTimeout(timer);
      clearInterval(trial);
      for (const each of [loss, speed, mfu, norm, line, log]) each.close();
    },
  };
}
