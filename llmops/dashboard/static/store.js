// The list of runs, kept up to date by events. Views are told the ids of what has changed.

import { stream } from "./api.js";

const RETRY_S = [1, 2, 5, 10];

export const store = {
  rows: new Map(),
  taken: 0, // of the server's clock, as are all times of runs
  ahead: 0, // seconds by which this machine's clock is ahead of the server's
  trouble: "",
  omitted: 0,
  connected: false,
  ready: false,
  now: () => Date.now() / 1000 - store.ahead,
};

const listeners = new Set();

/** `listener(changed, removed)`, sets of ids; empty ones when only the age or the trouble changes. Returns the way out. */
export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function tell(changed = new Set(), removed = new Set()) {
  for (const listener of [...listeners]) listener(changed, removed);
}

function take(name, data) {
  if (name === "trouble") {
    store.trouble = data.trouble;
    tell();
  }
  if (name !== "runs") return;
  const changed = new Set(), removed = new Set(data.removed);
  if (data.reset) {
    const there = new Set(data.runs.map((row) => row.id));
    for (const id of store.rows.keys()) if (!there.has(id)) removed.add(id);
  }
  for (const id of removed) store.rows.delete(id);
  for (const row of data.runs) {
    store.rows.set(row.id, row);
    changed.add(row.id);
  }
  store.taken = data.taken;
  store.ahead = Date.now() / 1000 - data.now;
  store.omitted = data.omitted;
  if (!data.trouble) store.trouble = "";
  store.ready = true;
  tell(changed, removed);
}

let under = null;
/** Follows the server's events for good; not while nobody looks, for a browser opens few connections to a server. */
export async function follow() {
  let failures = 0;
  document.addEventListener("visibilitychange", () => { if (document.hidden) under?.abort(); });
  for (;;) {
    if (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      continue;
    }
    under = new AbortController();
    try {
      await stream("api/events", (name, data) => {
        failures = 0;
        store.connected = true;
        take(name, data);
      }, under.signal);
    } catch (error) {
      if (error.name === "AbortError") continue;
    }
    store.connected = false;
    tell();
    const pause = RETRY_S[Math.min(failures, RETRY_S.length - 1)];
    failures += 1;
    await new Promise((resolve) => setTimeout(resolve, pause * 1000));
  }
}
