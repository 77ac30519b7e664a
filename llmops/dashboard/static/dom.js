// Elements. Whatever runs, programs and users have written becomes text nodes and attribute values, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") element.textContent = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

export const h = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
export const s = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

export const $ = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let spoken = null;
/** Says something to who cannot see it; the last of several in quick succession. */
export function announce(text) {
  clearTimeout(spoken);
  spoken = setTimeout(() => setText($("live"), text), 120);
}

/** A table as an alternative to a picture, made when it is opened. `read` gives {head, rows}; see `numeric` of fillTable. */
export function dataTable(label, read) {
  const table = h("table", {}, h("thead"), h("tbody"));
  table.setAttribute("aria-label", label);
  const scroll = h("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": label }, table);
  const details = h("details", {}, h("summary", { text: "Data table" }), scroll);
  const refresh = () => { if (details.open) fillTable(table, read()); };
  details.addEventListener("toggle", refresh);
  return { el: details, refresh };
}

/** `rows`: arrays of text or elements; the first cell names its row. `numeric`: are cells of a column right-aligned? */
export function fillTable(table, { head, rows, numeric = () => true }) {
  const align = (index) => (index > 0 && numeric(index) ? "number" : null);
  table.tHead.replaceChildren(
    h("tr", {}, head.map((text, index) => h("th", { scope: "col", class: align(index) }, text))),
  );
  table.tBodies[0].replaceChildren(...rows.map((row) => h("tr", {}, row.map((cell, index) => (
    index ? h("td", { class: align(index) }, cell) : h("th", { scope: "row" }, cell)
  )))));
}

/** Asks in a dialog; true for yes. */
export function confirmed(title, text, yes) {
  setText($("confirm-title"), title);
  setText($("confirm-text"), text);
  setText($("confirm-yes"), yes);
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  $("confirm-no").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// Calls back at once and whenever the element has another width; disconnect what it returns.
export function onWidth(element, changed) {
  let width = 0;
  const watched = new ResizeObserver(() => {
    if (element.clientWidth !== width) {
      width = element.clientWidth;
      changed();
    }
  });
  watched.observe(element);
  return watched;
}
