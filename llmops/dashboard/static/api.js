// What the server is asked. The token travels in a header: unlike a cookie, no other page and no other port of the
// same machine ever gets it.

import { $, setText } from "./dom.js";

let token = null;

/** Takes the token out of the address, so that it is neither shown nor kept in the history. */
export function readToken() {
  const given = /^#token=(.+)$/.exec(location.hash);
  if (given) {
    token = decodeURIComponent(given[1]);
    keep();
    history.replaceState(null, "", `${location.pathname}#/`);
    return;
  }
  try { token = sessionStorage.getItem("llmops.token"); } catch { /* it is asked for */ }
}

function keep() {
  try { sessionStorage.setItem("llmops.token", token); } catch { /* it lasts as long as the page */ }
}

export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let asking = null;
function ask(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("login");
    setText($("login-error"), wrong ? "That is not the token of this page." : "");
    $("token").value = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      token = $("token").value.trim();
      keep();
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

async function call(path, options = {}) {
  for (;;) {
    const used = token;
    const headers = { ...options.headers, ...(used ? { authorization: `Bearer ${used}` } : {}) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers, credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(0, "the dashboard's server does not answer");
    }
    if (answer.ok) return answer;
    if (answer.status !== 401) {
      const said = await answer.json().catch(() => ({}));
      throw new Failure(answer.status, said.error ?? `the server answered ${answer.status}`);
    }
    if (token === used) await ask(Boolean(used));
  }
}

export const get = async (path, options) => (await call(path, options)).json();

export async function post(path, body) {
  const headers = { "content-type": "application/json" };
  return (await call(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

/** Calls `on(name, data)` for each server-sent event until the stream ends. */
export async function stream(path, on, signal) {
  const reader = (await call(path, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const fields = Object.fromEntries(event.split("\n").map((line) => {
        const cut = line.indexOf(": ");
        return [line.slice(0, cut), line.slice(cut + 2)];
      }));
      on(fields.event ?? null, fields.data ? JSON.parse(fields.data) : null);
    }
  }
}
