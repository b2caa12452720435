"use strict";
// Data, elements and colours. Text reaches the page as text nodes alone.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** An element; children that are strings become text nodes, null is left out. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, label]) => element("option", { value }, label)));
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits);
  return /^-0\.?0*$/.test(text) ? text.slice(1) : text.replace("-", "−");
}

function signed(value, digits = 3) {
  const text = number(value, digits);
  return value > 0 && text !== (0).toFixed(digits) ? `+${text}` : text;
}

function small(value) {
  if (value === null || value === undefined) return "–";
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1).replace(/-/g, "−") : number(value);
}

/** How many an estimate is of, and of how many that were asked where that is known. */
const counts = (entry) => (entry[4] === null ? `${entry[3]}` : `${entry[3]} of ${entry[4]}`);

/** Cells of an estimate [value, low, high, n, asked]: the value, and its interval in small type. */
function estimate(entry, format = number) {
  if (!entry) return [element("span", { class: "none" }, "–"), " ", element("small")];
  const [value, low, high] = entry;
  const interval = low === null || high === null ? "" : `[${format(low)}, ${format(high)}]`;
  return [element("b", {}, format(value)), " ", element("small", {}, interval)];
}

// Colours: the system's, or the reader's choice; charts are drawn again in the new ones.
const system = matchMedia("(prefers-color-scheme: dark)");
const drawn = [];
function applyTheme() {
  const choice = $('input[name="theme"]:checked').value;
  document.documentElement.dataset.theme = choice;
  const dark = choice === "dark" || (choice === "auto" && system.matches);
  document.documentElement.toggleAttribute("data-dark", dark);
  drawn.forEach((draw) => draw());
}
$$('input[name="theme"]').forEach((input) => input.addEventListener("change", applyTheme));
system.addEventListener("change", applyTheme);
applyTheme();

$$("[data-download]").forEach((button) =>
  button.addEventListener("click", () => {
    const text = DATA.builds[button.dataset.download].record;
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const link = element("a", { href: url, download: "record.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }),
);

/** A table of which the first rows are shown, then more; sorted by its heads. */
function longTable(columns, rows, place, step = 50) {
  let sorted = rows, key = null, down = false, shown = step;
  const body = element("tbody");
  const heads = columns.map((column) =>
    element("th", { scope: "col", class: column.number ? "n" : null },
      element("button", { type: "button", onclick: () => sort(column) }, column.label)));
  const more = element("button", { type: "button", onclick: () => { shown += step * 4; fill(); } });
  function sort(column) {
    down = key === column ? !down : false;
    key = column;
    sorted = [...rows].sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (x === y) return 0;
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (x < y ? -1 : 1) * (down ? -1 : 1);
    });
    heads.forEach((head, i) => {
      if (columns[i] === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    fill();
  }
  function fill() {
    body.replaceChildren(...sorted.slice(0, shown).map((row) =>
      element("tr", {}, columns.map((column, i) =>
        element(i ? "td" : "th", { class: column.number ? "n" : column.mono ? "mono" : null,
          scope: i ? null : "row" }, column.text(row))))));
    more.hidden = sorted.length <= shown;
    more.textContent = `Show more (${sorted.length - shown} left)`;
  }
  fill();
  place.replaceChildren(
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table" },
      element("table", { class: "long" }, element("thead", {}, element("tr", {}, heads)), body)), more);
}
