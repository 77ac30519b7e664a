// The end of a rank's output.

import { get } from "./api.js";
import { panel } from "./cells.js";
import { h, setText } from "./dom.js";

const FOLLOW_MS = 2000, RETRY_MS = 8000;

/** `update(run)` tells of the run's ranks and attempts. */
export function logView(runId) {
  const rank = h("select", { id: "log-rank" });
  const attempt = h("select", { id: "log-attempt" }, h("option", { value: "", text: "all" }));
  const tail = h("select", { id: "log-tail" }, [100, 200, 500, 2000].map((each) => h("option", { value: each, text: String(each) })));
  tail.value = "200";
  const follow = h("input", { type: "checkbox", id: "log-follow" });
  follow.checked = true;
  const filter = h("input", { type: "search", placeholder: "Filter lines", "aria-label": "Filter lines", autocomplete: "off", spellcheck: "false" });
  const said = h("span", { class: "soft", role: "status" });
  const box = h("div", { class: "log", tabindex: 0, role: "region", "aria-label": "Log lines", id: "log" });
  const tools = h("div", { class: "tools" },
    h("label", { class: "field" }, "Rank", rank), h("label", { class: "field" }, "Attempt", attempt), h("label", { class: "field" }, "Last", tail),
    filter, h("label", { class: "field" }, follow, "follow"), said);
  const { el } = panel("Logs", tools, box);
  let lines = [], mark = "", timer = null, closed = false, asked = 0, over = false;

  function update(run) {
    const ranks = Math.min((run.nodes ?? 1) * (run.ranks_per_node ?? 1), 4096);
    over = ["finished", "failed", "cancelled"].includes(run.state);
    if (rank.options.length !== ranks + 2) {
      const chosen = rank.value || "0";
      rank.replaceChildren(...Array.from({ length: ranks }, (_, index) => h("option", { value: String(index), text: String(index) })),
        h("option", { value: "", text: "all" }), h("option", { value: "supervisor", text: "supervisors" }));
      rank.value = chosen;
    }
    for (const { number } of run.attempts.slice(attempt.options.length - 1)) {
      attempt.append(h("option", { value: String(number), text: String(number) }));
    }
  }

  async function read() {
    clearTimeout(timer);
    const mine = ++asked;
    let pause = over ? RETRY_MS : FOLLOW_MS;
    try {
      const query = new URLSearchParams({ tail: tail.value, rank: rank.value, attempt: attempt.value, after: mark });
      const found = await get(`api/logs/${encodeURIComponent(runId)}?${query}`);
      if (closed || mine !== asked) return;
      mark = found.mark;
      if (found.lines) {
        lines = found.lines;
        draw();
      }
      setText(said, lines.length ? "" : "nothing has been printed");
    } catch (error) {
      if (closed || mine !== asked) return;
      setText(said, error.message);
      pause = RETRY_MS;
    }
    if (follow.checked) timer = setTimeout(read, pause);
  }

  function draw() {
    const wanted = filter.value.toLowerCase();
    const shown = lines.filter((line) => !wanted || line.text.toLowerCase().includes(wanted));
    const sources = new Set(lines.map((line) => `${line.attempt}/${line.source}`));
    const bottom = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    box.replaceChildren(...shown.map((line) => h("div", {},
      sources.size > 1 ? h("span", { class: "from", text: `${line.attempt}/${line.source}  ` }) : null, line.text || "\u00a0")));
    if (bottom && follow.checked) box.scrollTop = box.scrollHeight;
  }

  function restart() {
    mark = "";
    lines = [];
    read();
  }

  for (const control of [rank, attempt, tail]) control.addEventListener("change", restart);
  follow.addEventListener("change", () => (follow.checked ? read() : clearTimeout(timer)));
  filter.addEventListener("input", draw);
  return {
    el, update, start: read,
    close: () => {
      closed = true;
      clearTimeout(timer);
    },
  };
}
