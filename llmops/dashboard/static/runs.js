// The list: one row for each run or study. A row is made once, and only cells that differ are drawn again.

import { OVER, badge, bar, pageOf, spark } from "./cells.js";
import { announce, h, setText } from "./dom.js";
import { compact, count, duration, figure, known, percent } from "./format.js";
import { store, subscribe } from "./store.js";

const ORDER = ["running", "preempted", "pending", "unknown", "failed", "cancelled", "finished"];
const TICK_MS = 5000;

// What stays when the reader comes back from another page.
const kept = { filter: "", states: new Set(), sort: null, chosen: new Set(), at: null };

const share = (row) => (row.max_steps ? row.step / row.max_steps : null);
const steps = (row) => (known(row.max_steps) ? `${count(row.step)} / ${count(row.max_steps)}` : count(row.step));
const restarts = (row) => Object.values(row.restarts ?? {}).reduce((sum, each) => sum + each, 0);
const why = (row) => Object.entries(row.restarts ?? {}).map(([reason, times]) => `${times} ${reason}`).join(", ");
const ago = (epoch) => (known(epoch) ? duration(store.now() - epoch) : "–");
const under = (row) => [row.backend, row.job_ids?.at(-1)].filter(Boolean).join(" ") || "not submitted";
const commit = (row) => row.last_commit?.time ?? null;

function reason(row) {
  if (known(row.stalled_s)) return `no step for ${duration(row.stalled_s)}`;
  return row.reason || row.phase || "";
}

// `value`: what is sorted by; `shown`: what the cell depends on; `draw`: its content.
const COLUMNS = [
  {
    key: "name", title: "Name", value: (row) => row.name.toLowerCase(), shown: (row) => [row.name, under(row)],
    draw: (row) => [
      h("a", { class: "name", href: pageOf(row), title: row.id, text: row.name }), h("span", { class: "under", text: under(row) }),
    ],
  },
  {
    key: "state", title: "State", value: (row) => ORDER.indexOf(row.state), shown: (row) => [row.state, reason(row), known(row.stalled_s)],
    draw: (row) => [
      badge(row.state),
      h("span", { class: known(row.stalled_s) ? "under warn" : "under", title: reason(row), text: reason(row) }),
    ],
  },
  {
    key: "progress", title: "Progress", value: share, shown: (row) => [steps(row), row.state],
    draw: (row) => [h("span", { text: row.trials ? `${steps(row)} trials` : steps(row) }), known(share(row)) ? bar(share(row), row.state) : null],
  },
  {
    key: "loss", title: "Loss", numeric: true, value: (row) => row.loss, shown: (row) => [row.loss, row.trials ? [] : row.recent_losses],
    draw: (row) => h("span", { class: "with-spark" }, row.trials ? null : spark(row.recent_losses), h("span", { class: "figure", text: figure(row.loss) })),
  },
  { key: "tokens", title: "Tokens/s", numeric: true, value: (row) => row.tokens_per_s, text: (row) => compact(row.tokens_per_s) },
  { key: "mfu", title: "MFU", numeric: true, value: (row) => row.mfu, text: (row) => percent(row.mfu, 1) },
  { key: "goodput", title: "Goodput", numeric: true, value: (row) => row.goodput, text: (row) => percent(row.goodput) },
  { key: "eta", title: "ETA", numeric: true, value: (row) => row.eta_s, text: (row) => duration(row.eta_s) },
  {
    key: "commit", title: "Last commit", numeric: true, value: (row) => (known(commit(row)) ? -commit(row) : null),
    text: (row) => (known(commit(row)) ? `${ago(commit(row))} ago` : "–"),
  },
  {
    key: "restarts", title: "Restarts", numeric: true, value: (row) => restarts(row), shown: (row) => [why(row)],
    draw: (row) => h("span", { title: why(row), text: restarts(row) ? count(restarts(row)) : "–" }),
  },
  { key: "owner", title: "Owner", value: (row) => row.owner, text: (row) => row.owner ?? "–" },
  { key: "age", title: "Age", numeric: true, value: (row) => (known(row.created) ? -row.created : null), text: (row) => ago(row.created) },
];

function compare(a, b) {
  if (!known(a) || !known(b)) return known(a) ? -1 : known(b) ? 1 : 0;
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}

/** Those that are not over first, then the newest. */
const byInterest = (a, b) =>
  OVER.has(a.state) - OVER.has(b.state) || (b.created ?? 0) - (a.created ?? 0) || a.id.localeCompare(b.id);

function sorted(rows) {
  if (!kept.sort) return rows.sort(byInterest);
  const { key, sign } = kept.sort, { value } = COLUMNS.find((column) => column.key === key);
  return rows.sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    return (known(left) && known(right) ? sign : 1) * compare(left, right) || byInterest(a, b);
  });
}

function matches(row) {
  if (kept.states.size && !kept.states.has(row.state)) return false;
  return kept.filter.toLowerCase().split(/\s+/).filter(Boolean).every((word) => {
    const cut = word.indexOf(":"), field = word.slice(0, cut);
    if (["state", "owner", "backend", "kind"].includes(field)) return String(row[field] ?? "").toLowerCase().startsWith(word.slice(cut + 1));
    return [row.name, row.id, row.owner, row.state, row.backend, ...(row.job_ids ?? [])].some(
      (text) => String(text ?? "").toLowerCase().includes(word),
    );
  });
}

export function showRuns(main, { toFilter }) {
  const drawn = new Map(); // by id: {tr, check, cells: [{td, shown}]}
  const head = h("tr", {}, h("th", { scope: "col", class: "check" }, h("span", { class: "hidden", text: "Choose" })));
  const body = h("tbody");
  const table = h("table", { id: "runs" }, h("caption", { class: "hidden", text: "Runs and studies" }), h("thead", {}, head), body);
  const counted = h("span", { class: "count", role: "status", id: "count" });
  const chips = h("div", { class: "chips", role: "group", "aria-label": "States" });
  const filter = h("input", {
    type: "search", id: "filter", placeholder: "Filter: name, state:running, owner:ada", "aria-label": "Filter runs", "aria-keyshortcuts": "/",
    autocomplete: "off", spellcheck: "false",
  });
  filter.value = kept.filter;
  const empty = h("p", { class: "empty" });
  const go = h("a", { id: "compare" }, h("button", { type: "button", class: "primary", tabindex: -1, text: "Compare" }));
  const selectedText = h("span");
  const clear = h("button", { type: "button", class: "plain", text: "Clear" });
  const selection = h("div", { class: "selection", role: "group", "aria-label": "Chosen runs", hidden: true }, selectedText, go, clear);
  main.append(
    h("h1", { class: "hidden", text: "Runs" }), h("div", { class: "tools" }, filter, chips, counted),
    h("div", { class: "panel runs" }, table, empty), selection,
  );

  const heads = COLUMNS.map((column) => {
    const th = h("th", { scope: "col", class: `c-${column.key}${column.numeric ? " number" : ""}`, "aria-sort": "none" });
    th.append(h("button", { type: "button", text: column.title, onclick: () => sortBy(column, th) }));
    head.append(th);
    return th;
  });

  function sortBy(column, th) {
    const now = th.getAttribute("aria-sort");
    kept.sort = now === "none" ? { key: column.key, sign: 1 } : now === "ascending" ? { key: column.key, sign: -1 } : null;
    arrange();
    announce(kept.sort ? `Sorted by ${column.title}, ${kept.sort.sign > 0 ? "ascending" : "descending"}` : "Live runs first, then the newest");
  }

  function make(row) {
    const check = h("input", { type: "checkbox", onchange: () => choose(row.id, check.checked) });
    check.checked = kept.chosen.has(row.id);
    const tr = h("tr", {}, h("td", { class: "check" }, row.trials ? null : h("label", {}, check)));
    tr.dataset.id = row.id;
    const cells = COLUMNS.map((column, index) => {
      const td = h(index ? "td" : "th", { class: `c-${column.key}${column.numeric ? " number" : ""}`, scope: index ? null : "row" });
      tr.append(td);
      return { td, shown: null };
    });
    return { tr, check, cells };
  }

  function draw(row) {
    let item = drawn.get(row.id);
    if (!item) drawn.set(row.id, (item = make(row)));
    item.check.setAttribute("aria-label", `Choose ${row.name}`);
    item.tr.className = OVER.has(row.state) ? "over" : "";
    COLUMNS.forEach((column, index) => {
      const cell = item.cells[index];
      const shown = column.text ? column.text(row) : JSON.stringify(column.shown(row));
      if (cell.shown === shown) return;
      cell.shown = shown;
      if (column.text) cell.td.textContent = shown;
      else cell.td.replaceChildren(...[column.draw(row)].flat().filter(Boolean));
    });
  }

  /** Brings rows into order, moving only those that are elsewhere. */
  function arrange() {
    const focused = document.activeElement;
    const rows = sorted([...store.rows.values()].filter(matches));
    let next = body.firstElementChild;
    for (const row of rows) {
      const { tr } = drawn.get(row.id);
      if (tr === next) next = next.nextElementSibling;
      else body.insertBefore(tr, next);
    }
    while (next) {
      const gone = next;
      next = next.nextElementSibling;
      gone.remove();
    }
    if (focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
    COLUMNS.forEach((column, index) => {
      const sign = kept.sort?.key === column.key ? kept.sort.sign : 0;
      heads[index].setAttribute("aria-sort", sign > 0 ? "ascending" : sign < 0 ? "descending" : "none");
    });
    const more = store.omitted ? `, and ${count(store.omitted)} older ones that are over` : "";
    const all = store.rows.size;
    setText(counted, store.ready ? (rows.length === all ? `${count(all)} runs${more}` : `${count(rows.length)} of ${count(all)} runs${more}`) : "");
    table.hidden = rows.length === 0;
    empty.hidden = rows.length > 0;
    setText(empty, !store.ready ? "Reading the run store…" : all ? "No run matches the filter." : "There are no runs yet. llmops submit starts one.");
  }

  function tally() {
    const counts = new Map();
    for (const row of store.rows.values()) counts.set(row.state, (counts.get(row.state) ?? 0) + 1);
    const states = ORDER.filter((state) => counts.has(state) || kept.states.has(state));
    const there = [...chips.children];
    if (there.map((chip) => chip.dataset.state).join() !== states.join()) {
      chips.replaceChildren(...states.map((state) => {
        const chip = h("button", { type: "button", class: "chip" }, h("b"), ` ${state}`);
        chip.dataset.state = state;
        chip.addEventListener("click", () => {
          if (!kept.states.delete(state)) kept.states.add(state);
          tally();
          arrange();
        });
        return chip;
      }));
    }
    for (const chip of chips.children) {
      setText(chip.firstElementChild, String(counts.get(chip.dataset.state) ?? 0));
      chip.setAttribute("aria-pressed", String(kept.states.has(chip.dataset.state)));
    }
  }

  function choose(id, on) {
    if (on) kept.chosen.add(id);
    else kept.chosen.delete(id);
    const item = drawn.get(id);
    if (item) item.check.checked = on;
    chosen();
  }

  function chosen() {
    const ids = [...kept.chosen];
    selection.hidden = ids.length === 0;
    setText(selectedText, `${ids.length} chosen`);
    go.href = `#/compare?ids=${ids.map(encodeURIComponent).join(",")}`;
  }

  function update(changed, removed) {
    for (const id of removed) {
      drawn.get(id)?.tr.remove();
      drawn.delete(id);
      kept.chosen.delete(id);
    }
    for (const id of changed) draw(store.rows.get(id));
    if (changed.size || removed.size) {
      tally();
      arrange();
      chosen();
    }
  }

  function move(by) {
    const links = [...body.querySelectorAll("a.name")];
    const at = links.indexOf(document.activeElement.closest("tr")?.querySelector("a.name"));
    const next = at < 0 ? (by > 0 ? 0 : links.length - 1) : Math.min(Math.max(at + by, 0), links.length - 1);
    links[next]?.focus();
    links[next]?.scrollIntoView({ block: "nearest" });
  }

  function key(event) {
    if (["j", "ArrowDown"].includes(event.key)) move(1);
    else if (["k", "ArrowUp"].includes(event.key)) move(-1);
    else if (event.key === "/") filter.focus();
    else if (event.key === "x") {
      const id = document.activeElement.closest("tr")?.dataset.id;
      if (!id || store.rows.get(id)?.trials) return false;
      choose(id, !kept.chosen.has(id));
      announce(`${kept.chosen.size} chosen`);
    } else if (event.key === "c" && kept.chosen.size) location.hash = go.getAttribute("href");
    else if (event.key === "Escape" && (kept.filter || kept.states.size)) {
      kept.filter = filter.value = "";
      kept.states.clear();
      tally();
      arrange();
      return true;
    } else return false;
    return true;
  }

  filter.addEventListener("input", () => {
    kept.filter = filter.value;
    arrange();
  });
  clear.addEventListener("click", () => {
    for (const id of [...kept.chosen]) choose(id, false);
    filter.focus();
  });
  body.addEventListener("focusin", (event) => { kept.at = event.target.closest("tr")?.dataset.id ?? kept.at; });

  const leave = subscribe(update);
  const ages = setInterval(() => { for (const row of store.rows.values()) draw(row); }, TICK_MS);
  for (const row of store.rows.values()) draw(row);
  tally();
  arrange();
  chosen();
  requestAnimationFrame(() => {
    if (toFilter) filter.focus();
    else if (kept.at) drawn.get(kept.at)?.tr.querySelector("a.name")?.focus();
  });
  return {
    title: "Runs", key,
    close: () => {
      leave();
      clearInterval(ages);
    },
  };
}
