// The frame of all pages: which one is shown, how fresh it is, keys, theme.

import { get, readToken } from "./api.js";
import { $, announce, setText } from "./dom.js";
import { duration } from "./format.js";
import { showCompare } from "./compare.js";
import { showGoodput } from "./goodput.js";
import { showRun } from "./run.js";
import { showRuns } from "./runs.js";
import { showStudy } from "./study.js";
import { follow, store, subscribe } from "./store.js";

const LATE_S = 30;
export const about = { actions: false };

const ROUTES = [
  [/^\/?$/, "runs", () => showRuns],
  [/^\/run\/(.+)$/, null, () => showRun],
  [/^\/compare$/, null, () => showCompare],
  [/^\/study\/(.+)$/, null, () => showStudy],
  [/^\/goodput$/, "goodput", () => showGoodput],
];

let page = null, toFilter = false;

/** A page is `show(main, {id, query, about, toFilter})`; it gives {title, close?, key?(event)}. */
function route(first = false) {
  const [path, search = ""] = location.hash.slice(1).split("?");
  const match = ROUTES.find(([pattern]) => pattern.test(path)) ?? ROUTES[0];
  const [pattern, nav, view] = match;
  page?.close?.();
  $("main").replaceChildren();
  for (const name of ["runs", "goodput"]) {
    if (nav === name) $(`nav-${name}`).setAttribute("aria-current", "page");
    else $(`nav-${name}`).removeAttribute("aria-current");
  }
  const id = decodeURIComponent(pattern.exec(path)?.[1] ?? "");
  page = view()($("main"), { id, query: new URLSearchParams(search), about, toFilter });
  toFilter = false;
  document.title = page.title ? `${page.title} – llmops` : "llmops";
  if (!first) {
    scrollTo(0, 0);
    const heading = $("main").querySelector("h1");
    heading?.setAttribute("tabindex", "-1");
    heading?.focus({ preventScroll: true });
  }
}

// --- how fresh the page is ------------------------------------------------------------------------------------------

function fresh() {
  const age = store.now() - store.taken, late = age > LATE_S || Boolean(store.trouble);
  const state = !store.ready ? "late" : !store.connected ? "off" : late ? "late" : "live";
  $("fresh").className = `fresh ${state}`;
  const ago = `${state === "live" ? "" : "as of "}${age < 2 ? "just now" : `${duration(age)} ago`}`;
  setText($("fresh-text"), store.ready ? ago : "reading…");
  const lost = store.ready && !store.connected ? "The dashboard's server does not answer. Trying again." : "";
  const trouble = store.trouble && `The list is not up to date: ${store.trouble}`;
  setText($("trouble"), lost || trouble);
  $("trouble").hidden = !(lost || trouble);
}

// --- theme ----------------------------------------------------------------------------------------------------------

const THEMES = { system: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

function theme(next) {
  const { llmopsTheme } = globalThis;
  if (next) {
    const names = Object.keys(THEMES);
    llmopsTheme.choose(names[(names.indexOf(llmopsTheme.chosen) + 1) % names.length]);
    announce(`Theme: ${THEMES[llmopsTheme.chosen][1]}`);
  }
  const [sign, words] = THEMES[llmopsTheme.chosen];
  $("theme").firstElementChild.textContent = sign;
  $("theme").setAttribute("aria-label", `Theme: ${words}`);
  $("theme").title = `Theme: ${words}`;
}

// --- keys -----------------------------------------------------------------------------------------------------------

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const writes = event.target.closest("input:not([type=checkbox]):not([type=range]), select, textarea");
  if (event.key === "Escape") {
    if (writes) event.target.blur();
    else if (page?.key?.(event) !== true && location.hash.length > 2) location.hash = "#/";
    return;
  }
  if (writes) return;
  if (event.key === "?") {
    $("help").showModal();
    event.preventDefault();
  } else if (page?.key?.(event)) event.preventDefault();
  else if (event.key === "/") {
    event.preventDefault();
    toFilter = true;
    location.hash = "#/";
  }
}

readToken();
theme(false);
$("theme").addEventListener("click", () => theme(true));
$("help-button").addEventListener("click", () => $("help").showModal());
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});
document.addEventListener("keydown", key);
addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) {
    readToken();
    location.reload();
  } else route();
});
subscribe(fresh);
setInterval(fresh, 1000);
fresh();
route(true);
get("api/about").then((known) => {
  Object.assign(about, known);
  if (known.actions) route(true);
}).catch(() => { /* the stream tells that the server does not answer */ });
follow();
