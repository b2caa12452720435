"use strict";
// Answers side by side, of any two columns: a column is one side of one build.
const COLUMNS = DATA.builds.flatMap((build) =>
  ["base", "edited"].map((side) => ({
    build, side,
    label: DATA.builds.length > 1 ? `${build.name}, ${side}` : side,
  })));
const SET_NAMES = { target: "target", neutral: "neutral", over_refusal: "over-refusal" };
const PAGE = 30;
const state = { a: COLUMNS[0], b: COLUMNS[1], pairs: [], matches: [], shown: PAGE };

/** Pairs of answers to the same prompts, each with the text that a search reads. */
function pairsOf(a, b) {
  const pairs = [];
  for (const [set, rows] of Object.entries(a.build.answers)) {
    const others = b.build.answers[set] || [];
    const byPrompt = a.build === b.build ? null : new Map(others.map((row) => [row.prompt, row]));
    rows.forEach((row, index) => {
      const other = byPrompt ? byPrompt.get(row.prompt) : row;
      const [left, right] = [row[a.side], other && other[b.side]];
      if (!left || !right) return;
      const haystack = [row.prompt, left.text, right.text, left.thinking || "", right.thinking || ""]
        .join("\n").toLowerCase();
      const groups = Object.entries(row.groups || {}).map(([column, name]) => `${column}: ${name}`);
      pairs.push({ set, index, prompt: row.prompt, groups, left, right, haystack });
    });
  }
  return pairs;
}

const kinds = (side) => [...new Set(state.pairs.map((pair) => pair[side].kind))].sort();
const filter = { set: $("#f-set"), group: $("#f-group"), change: $("#f-change"), a: $("#f-a"), b: $("#f-b"),
  rules: $("#f-rules"), search: $("#f-search") };

function resetFilters() {
  const sets = [...new Set(state.pairs.map((pair) => pair.set))];
  options(filter.set, [["", "all"], ...sets.map((set) => [set, SET_NAMES[set] || set])]);
  const groups = [...new Set(state.pairs.flatMap((pair) => pair.groups))].sort();
  options(filter.group, [["", "all"], ...groups.map((group) => [group, group])]);
  $("#f-group-label").hidden = !groups.length;
  options(filter.change, [["", "any"], ["changed", "changed"], ["same", "unchanged"]]);
  options(filter.a, [["", "any"], ...kinds("left").map((kind) => [kind, kind])]);
  options(filter.b, [["", "any"], ...kinds("right").map((kind) => [kind, kind])]);
  $(".filters .a").textContent = state.a.label;
  $(".filters .b").textContent = state.b.label;
  const disagree = state.pairs.some((pair) => pair.left.rules || pair.right.rules);
  $("#f-rules-label").hidden = !disagree;
  filter.rules.checked = false;
  filter.search.value = "";
}

function matches(pair, { set, group, change, a, b, rules, words }) {
  return (!set || pair.set === set) && (!group || pair.groups.includes(group))
    && (!a || pair.left.kind === a) && (!b || pair.right.kind === b)
    && (!change || (pair.left.kind !== pair.right.kind) === (change === "changed"))
    && (!rules || pair.left.rules !== undefined || pair.right.rules !== undefined)
    && words.every((word) => pair.haystack.includes(word));
}

function applyFilters() {
  const values = { set: filter.set.value, group: filter.group.value, change: filter.change.value, a: filter.a.value,
    b: filter.b.value, rules: filter.rules.checked,
    words: filter.search.value.toLowerCase().split(/\s+/).filter(Boolean) };
  state.matches = state.pairs.filter((pair) => matches(pair, values));
  state.shown = PAGE;
  $("#count").textContent = `${state.matches.length} of ${state.pairs.length} pairs`;
  drawMatrix(values);
  const first = state.matches.slice(0, PAGE);
  $("#pairs").replaceChildren(...first.map((pair) => pairElement(pair, values.words)));
  $("#more").hidden = state.matches.length <= PAGE;
}

function showMore() {
  const next = state.matches.slice(state.shown, state.shown + PAGE);
  const words = filter.search.value.toLowerCase().split(/\s+/).filter(Boolean);
  $("#pairs").append(...next.map((pair) => pairElement(pair, words)));
  state.shown += next.length;
  $("#more").hidden = state.shown >= state.matches.length;
}

/** Verdicts of A in rows, of B in columns; a count filters by that change. */
function drawMatrix(values) {
  const counted = state.pairs.filter((pair) => matches(pair, { ...values, a: "", b: "", change: "" }));
  const [rows, columns] = [kinds("left"), kinds("right")];
  const cell = (row, column) => {
    const n = counted.filter((p) => p.left.kind === row && p.right.kind === column).length;
    if (!n) return element("td", { class: "n none" }, "·");
    const on = filter.a.value === row && filter.b.value === column;
    return element("td", { class: "n" }, element("button", {
      type: "button", class: row === column ? "same" : null, "aria-pressed": String(on),
      "aria-label": `${n}: ${state.a.label} ${row}, ${state.b.label} ${column}`,
      onclick: () => {
        filter.a.value = on ? "" : row;
        filter.b.value = on ? "" : column;
        applyFilters();
        const pressed = $(`#matrix [data-cell="${row} ${column}"]`);
        if (pressed) pressed.focus();
      }, "data-cell": `${row} ${column}` }, String(n)));
  };
  $("#matrix").replaceChildren(element("table", { class: "matrix" },
    element("thead", {}, element("tr", {},
      element("td", { class: "hint" }, `${state.a.label} ↓  ${state.b.label} →`),
      columns.map((kind) => element("th", { scope: "col", class: "n" }, chip(kind))))),
    element("tbody", {}, rows.map((row) => element("tr", {},
      element("th", { scope: "row" }, chip(row)), columns.map((column) => cell(row, column)))))));
}

const KINDS = ["refused", "complied", "partial", "deflected", "broken"];
const chip = (kind) => element("span", { class: KINDS.includes(kind) ? `chip ${kind}` : "chip" }, kind || "unscored");

/** Text with the searched words marked. */
function marked(text, words) {
  if (!words.length) return [text];
  const lower = text.toLowerCase();
  if (lower.length !== text.length) return [text]; // positions would not be the same
  const parts = [];
  let at = 0;
  while (at < text.length) {
    let next = -1, length = 0;
    for (const word of words) {
      const found = lower.indexOf(word, at);
      if (found >= 0 && (next < 0 || found < next)) [next, length] = [found, word.length];
    }
    if (next < 0) break;
    parts.push(text.slice(at, next), element("mark", {}, text.slice(next, next + length)));
    at = next + length;
  }
  parts.push(text.slice(at));
  return parts;
}

function sideElement(answer, column, words) {
  const grades = answer.compliance === null || answer.compliance === undefined
    ? null : `compliance ${answer.compliance}, coherence ${answer.coherence}`;
  return element("div", { class: "side" },
    element("div", { class: "head" }, element("strong", {}, column.label), chip(answer.kind),
      grades, element("span", {}, `${answer.tokens} tokens${answer.cut ? ", cut" : ""}`),
      answer.rules ? element("span", {}, "rules: ", chip(answer.rules)) : null),
    answer.read ? element("details", {}, element("summary", {}, "Conversation"),
      element("p", { class: "text" }, marked(answer.read, words))) : null,
    answer.thinking ? element("details", {},
      element("summary", {}, answer.thinkingRefuses ? "Thinking (comes to a refusal)" : "Thinking"),
      element("p", { class: "text" }, marked(answer.thinking, words))) : null,
    element("p", { class: "text" }, answer.text ? marked(answer.text, words) : "(empty)"),
    answer.reasons && answer.reasons.length
      ? element("p", { class: "reasons" }, answer.reasons.join("; ")) : null);
}

function pairElement(pair, words) {
  return element("article", { class: "pair", tabindex: -1 },
    element("h3", {}, element("small", {},
      [`${SET_NAMES[pair.set] || pair.set} ${pair.index + 1}`, ...pair.groups].join(", ")),
      element("span", {}, marked(pair.prompt, words))),
    element("div", { class: "sides" }, sideElement(pair.left, state.a, words),
      sideElement(pair.right, state.b, words)));
}

function chooseColumns(a, b) {
  [state.a, state.b] = [a, b];
  state.pairs = pairsOf(a, b);
  resetFilters();
  applyFilters();
}

Object.values(filter).forEach((input) =>
  input.addEventListener(input.type === "search" ? "input" : "change", applyFilters));
// A count of refusals that remain shows these answers.
$$("[data-show-group]").forEach((button) => button.addEventListener("click", () => {
  resetFilters();
  filter.set.value = button.dataset.showSet;
  filter.group.value = button.dataset.showGroup;
  filter.b.value = "refused";
  applyFilters();
  $("#answers").scrollIntoView({ block: "start" });
}));
$("#f-clear").addEventListener("click", () => { resetFilters(); applyFilters(); });
$("#more").addEventListener("click", showMore);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "/") { event.preventDefault(); filter.search.focus(); return; }
  if (event.key !== "j" && event.key !== "k") return;
  const all = $$("#pairs .pair"), at = all.indexOf(document.activeElement);
  if (event.key === "j" && at === all.length - 1 && !$("#more").hidden) showMore();
  const next = $$("#pairs .pair")[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
  if (next) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "start" }); }
});

// Two columns compared: only in a report on several builds.
const MEASURES = { refusal: "Refusal", compliance: "Compliance", coherence: "Coherence",
  product: "Compliance × coherence", truncated: "Cut at the token limit", unscored: "Unscored",
  thinking_refusal: "Refuses in its thinking" };

function drawComparison() {
  const [a, b] = [state.a, state.b];
  const rows = [];
  for (const set of Object.keys({ ...a.build.measures, ...b.build.measures }))
    for (const [key, label] of Object.entries(MEASURES)) {
      const [x, y] = [a, b].map((c) => ((c.build.measures[set] || {})[c.side] || {})[key]);
      if (x || y) rows.push([`${SET_NAMES[set] || set}: ${label.toLowerCase()}`, x, y]);
    }
  for (const task of Object.keys({ ...a.build.benchmarks, ...b.build.benchmarks })) {
    const [x, y] = [a, b].map((c) => (c.build.benchmarks[task] || {})[c.side]);
    rows.push([task, x, y]);
  }
  $("#comparison").replaceChildren(
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Comparison" },
      element("table", { class: "stack" },
        element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Measure"),
          [a.label, b.label, "B − A", "n"].map((t) => element("th", { scope: "col", class: "n" }, t)))),
        element("tbody", {}, rows.map(([label, x, y]) => element("tr", {},
          element("th", { scope: "row" }, label),
          element("td", { class: "n", "data-label": a.label }, estimate(x)),
          element("td", { class: "n", "data-label": b.label }, estimate(y)),
          element("td", { class: "n", "data-label": "B − A" }, x && y ? signed(y[0] - x[0]) : "–"),
          element("td", { class: "n", "data-label": "n" },
            [x, y].map((e) => (e ? counts(e) : "–")).join(", "))))))),
    element("p", { class: "hint" },
      `Differences are of the values: columns of two builds are not paired. ${state.pairs.length} prompts were put to both.`));
}

if ($("#compare")) {
  const [a, b] = [$("#column-a"), $("#column-b")];
  const entries = COLUMNS.map((column, i) => [String(i), column.label]);
  [a, b].forEach((select) => options(select, entries));
  a.value = "1";
  b.value = "3";
  const choose = () => { chooseColumns(COLUMNS[a.value], COLUMNS[b.value]); drawComparison(); };
  [a, b].forEach((select) => select.addEventListener("change", choose));
  choose();
} else chooseColumns(COLUMNS[0], COLUMNS[1]);
