"use strict";
// Charts, drawn when they come into view, and again when colours or width change.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const SERIES = ["c1", "c2", "c3", "c4"];
const isDark = () => document.documentElement.hasAttribute("data-dark");

const TIP = { lineHeight: 1.25, textPadding: 9, pathFilter: null };

function plot(options) {
  const chart = Plot.plot({
    style: { background: "transparent", color: "inherit", fontFamily: "inherit", fontSize: "12px" },
    marginLeft: 52, marginRight: 16, ...options });
  chart.setAttribute("role", "img");
  if (options.ariaLabel) chart.setAttribute("aria-label", options.ariaLabel);
  return chart;
}

const legend = (...entries) => element("div", { class: "legend" }, entries.map(([kind, token, label]) => {
  const swatch = element("i", { class: kind });
  swatch.style.background = colour(token);
  return element("span", {}, swatch, label);
}));

const PANELS = [
  { key: "bypass", label: "bypass, log-odds", better: "lower", base: true },
  { key: "kl", label: "KL, nats a token", better: "lower", gate: "max_kl" },
  { key: "induce", label: "induce, log-odds", better: "higher", gate: "min_induce" },
  { key: "compliance", label: "compliance", better: "higher", rate: true, base: true },
  { key: "coherence", label: "coherence", better: "higher", rate: true, base: true },
];
const valueOf = (row, panel) => (panel.rate ? row[panel.key] && row[panel.key][0] : row[panel.key]);

function candidateTitle(c) {
  const lines = [`layer ${c.layer}${c.position === -1 ? "" : `, token ${c.position}`}`,
    `bypass ${number(c.bypass)}`, `KL ${small(c.kl)}`, `induce ${number(c.induce)}`];
  for (const key of ["compliance", "coherence"])
    if (c[key]) lines.push(`${key} ${number(c[key][0])} (n = ${counts(c[key])})`);
  if (c.stopped.length) lines.push(`stopped by ${c.stopped.join(", ")}`);
  return lines.join("\n");
}

function sweep(build, width) {
  const { base, candidates } = build.selection;
  const positions = [...new Set(candidates.map((c) => c.position))].sort((x, y) => (y - x) || 0);
  const hue = (c) => colour(SERIES[positions.indexOf(c.position) % SERIES.length]);
  const layers = candidates.map((c) => c.layer);
  const domain = [Math.min(...layers) - 0.5, Math.max(...layers) + 0.5];
  const panels = PANELS.filter((panel) => candidates.some((c) => valueOf(c, panel) != null));
  const made = panels.map((panel, i) => {
    const rows = candidates.filter((c) => valueOf(c, panel) != null).sort((x, y) => x.layer - y.layer);
    const values = rows.map((c) => valueOf(c, panel));
    const positive = values.filter((v) => v > 0);
    const log = panel.key === "kl" && positive.length === values.length
      && Math.max(...values) > 30 * Math.min(...values);
    const last = i === panels.length - 1, gate = panel.gate ? build.gates[panel.gate] : null;
    const baseValue = panel.base ? valueOf(base, panel) : null;
    const reference = (y, text, stroke, dash) => y == null || (log && y <= 0) ? [] : [
      Plot.ruleY([y], { stroke, strokeDasharray: dash }),
      Plot.text([text], { x: domain[1], y, text: (d) => d, textAnchor: "end", dy: -6, fill: stroke,
        stroke: colour("page"), strokeWidth: 4 }),
    ];
    return plot({
      width, height: last ? 134 : 110, marginTop: 24, marginBottom: last ? 34 : 10,
      ariaLabel: `${panel.label} by layer; ${panel.better} is better`,
      x: { domain, label: last ? "layer" : null, axis: last ? "bottom" : null, ticks: Math.min(12, domain[1] - domain[0]), tickFormat: (d) => (Number.isInteger(d) ? String(d) : "") },
      y: { label: `${panel.better === "lower" ? "↓" : "↑"} ${panel.label} (${panel.better} is better)`,
        labelArrow: "none", labelAnchor: "top", grid: true, ticks: panel.rate ? [0, 0.5, 1] : 3, type: log ? "log" : "linear", tickFormat: log ? "~g" : undefined,
        domain: panel.rate ? [0, 1] : undefined, nice: !panel.rate },
      marks: [
        Plot.ruleX(build.layers, { stroke: colour("base"), strokeDasharray: "2 3" }),
        ...reference(baseValue, "base", colour("base"), "1 0"),
        ...reference(gate, `gate ${gate}`, colour("gate"), "5 3"),
        panel.rate ? Plot.ruleX(rows, { x: "layer", y1: (c) => c[panel.key][1] ?? c[panel.key][0],
          y2: (c) => c[panel.key][2] ?? c[panel.key][0], stroke: hue, strokeOpacity: 0.6 }) : null,
        Plot.line(rows, { x: "layer", y: (c) => valueOf(c, panel), z: "position", stroke: hue,
          strokeWidth: 1.5, strokeOpacity: panel.rate ? 0.35 : 1 }),
        Plot.dot(rows, { x: "layer", y: (c) => valueOf(c, panel), r: 3, stroke: hue,
          fill: (c) => (c.stopped.length ? colour("page") : hue(c)) }),
        Plot.tip(rows, Plot.pointerX({ ...TIP, x: "layer", y: (c) => valueOf(c, panel), title: candidateTitle })),
      ],
    });
  });
  const entries = positions.length > 1
    ? positions.map((p, i) => ["", SERIES[i % SERIES.length], `token ${p}`]) : [];
  return [entries.length ? legend(...entries) : null,
    element("p", { class: "hint" }, "Dashed: chosen layers. Hollow: stopped by a gate. Bars: 95 % intervals."), ...made];
}

function cosines(build, width) {
  const side = Math.min(width, 560), n = build.cosines.length;
  const cells = build.cosines.flatMap((row, y) => row.map((c, x) => ({ x: x + 1, y: y + 1, c })));
  const ramp = isDark() ? ["#f0a04b", "#20252c", "#a79be0"] : ["#b35806", "#f5f5f6", "#5a3a9a"];
  const ticks = d3.range(1, n + 1).filter((layer) => (layer - 1) % Math.ceil(n / 12) === 0);
  const bar = element("span", { class: "ramp" });
  bar.style.background = `linear-gradient(to right, ${ramp.join(", ")})`;
  return [element("div", { class: "legend" }, element("span", {}, "−1", bar, "1"),
      element("span", {}, "outlined: chosen layers")),
    plot({
      width: side, height: side, marginBottom: 36, ariaLabel: "Heatmap of cosines between layers",
      x: { label: "layer", ticks, tickSize: 0, padding: 0, domain: d3.range(1, n + 1) },
      y: { label: "layer", ticks, tickSize: 0, padding: 0, reverse: true, domain: d3.range(1, n + 1) },
      color: { domain: [-1, 0, 1], range: ramp, type: "linear", interpolate: "rgb" },
      marks: [
        Plot.cell(cells, { x: "x", y: "y", fill: "c", inset: n > 40 ? 0 : 0.5 }),
        Plot.cell(build.layers.filter((layer) => layer <= n).map((layer) => ({ layer })),
          { x: "layer", y: "layer", fill: "none", stroke: colour("text"), strokeWidth: 2 }),
        Plot.tip(cells, Plot.pointer({ ...TIP, x: "x", y: "y",
          title: (d) => `layers ${d.x} and ${d.y}\ncosine ${number(d.c)}` })),
      ],
    })];
}

const trialName = (t) => (t.selected ? "selected" : t.start ? "start" : t.front ? "on the front" : "tried");

function front(build, width, key, better) {
  const rows = build.tuning.filter((t) => t[key]);
  const of = (i) => (t) => t[key][i] ?? t[key][0];
  const hue = (t) => colour(t.selected ? "c2" : t.front ? "c1" : "base");
  const log = rows.every((t) => t.kl > 0) && d3.max(rows, (t) => t.kl) > 20 * d3.min(rows, (t) => t.kl);
  const limit = build.gates.max_kl, within = limit <= 3 * d3.max(rows, (t) => t.kl);
  const middle = d3.mean(d3.extent(rows, (t) => t.kl));
  return [legend(["", "c2", "selected"], ["", "c1", "on the front"], ["", "base", "other trials"]),
    plot({
      width, height: 300, marginTop: 30, marginBottom: 38, ariaLabel: `${key} against KL of every trial`,
      x: { label: "KL on neutral prompts, nats a token (lower is better)", labelArrow: "none",
        labelAnchor: "center", type: log ? "log" : "linear", tickFormat: log ? "~g" : undefined, nice: true, grid: true },
      y: { label: `${better === "lower" ? "↓" : "↑"} ${key} (${better} is better)`, labelArrow: "none", domain: [0, 1], grid: true },
      marks: [
        within ? Plot.ruleX([limit], { stroke: colour("gate"), strokeDasharray: "5 3" }) : null,
        within ? Plot.text([`max_kl ${limit}`], { x: limit, frameAnchor: "top", text: (d) => d, fill: colour("gate"), textAnchor: "end", dx: -4 }) : null,
        Plot.line(rows.filter((t) => t.front).sort((x, y) => x.kl - y.kl),
          { x: "kl", y: of(0), stroke: colour("c1"), strokeOpacity: 0.4 }),
        Plot.ruleX(rows, { x: "kl", y1: of(1), y2: of(2), stroke: hue, strokeOpacity: 0.55 }),
        Plot.dot(rows, { x: "kl", y: of(0), r: (t) => (t.selected ? 6 : 4), fill: hue }),
        ...["start", "end"].map((anchor) => Plot.text(
          rows.filter((t) => (t.start || t.selected) && (t.kl > middle) === (anchor === "end")),
          { x: "kl", y: of(0), text: trialName, dy: -11, textAnchor: anchor })),
        Plot.tip(rows, Plot.pointer({ ...TIP, x: "kl", y: of(0), title: (t) =>
          `${trialName(t)}\n${key} ${number(t[key][0])} (n = ${counts(t[key])})\nKL ${small(t.kl)}\nKL weight ${t.weight}, scale ${t.scale}` })),
      ],
    })];
}

const tensorTitle = (t) => [t.name, `strength ${number(t.strength)}`,
  t.change == null ? null : `size of change ${small(t.change)}`,
  t.leak == null ? null : `leak ${small(t.leak)}, off by ${small(t.off)}`].filter(Boolean).join("\n");

function weights(build, width) {
  const components = [...new Set(build.tensors.map((t) => t.component))];
  const hue = (t) => colour(SERIES[components.indexOf(t.component) % SERIES.length]);
  const panels = [["strength", "strength s (1 removes)", false], ["change", "size of change, |W′ − W| / |W|", false],
    ["off", "leak, off from |1 − s|", true]];
  const each = width > 900 ? width / 3 : width;
  const charts = panels.map(([key, label, tiny]) => {
    const rows = build.tensors.filter((t) => t[key] != null && !(tiny && t[key] <= 0));
    if (!rows.length) return null;
    const log = tiny && d3.max(rows, (t) => t[key]) > 20 * d3.min(rows, (t) => t[key]);
    return plot({
      width: each, height: 190, marginTop: 26, marginBottom: 34, marginLeft: 60, ariaLabel: `${label} of each tensor by block`,
      x: { label: "block", nice: true, tickFormat: (d) => (Number.isInteger(d) ? String(d) : "") },
      y: { label, labelArrow: "none", grid: true, type: log ? "log" : "linear", ticks: log ? 3 : 5,
        tickFormat: tiny ? (d) => (d && d < 0.001 ? d.toExponential(0) : String(d)) : undefined, zero: !log, nice: true },
      marks: [
        Plot.dot(rows, { x: "layer", y: key, fill: hue, r: 3, fillOpacity: 0.85 }),
        Plot.tip(rows, Plot.pointer({ ...TIP, x: "layer", y: key,
          title: tensorTitle })),
      ],
    });
  });
  const row = element("div", {}, charts);
  if (width > 900) row.style.display = "flex";
  return [legend(...components.map((name, i) => ["", SERIES[i % SERIES.length], name])), row];
}

const CHARTS = { sweep, cosines, weights,
  "front-refusal": (build, width) => front(build, width, "refusal", "lower"),
  "front-product": (build, width) => front(build, width, "product", "higher") };

function drawer(place) {
  let width = 0;
  return (resized) => {
    if (resized && place.clientWidth === width) return;
    width = place.clientWidth;
    if (width) place.replaceChildren(...CHARTS[place.dataset.chart](DATA.builds[place.dataset.build], width).filter(Boolean));
  };
}
const seen = new IntersectionObserver((entries) => entries.forEach(({ isIntersecting, target }) => {
  if (!isIntersecting) return;
  seen.unobserve(target);
  const draw = drawer(target);
  drawn.push(draw);
  draw();
}), { rootMargin: "400px" });
$$("[data-chart]").forEach((place) => seen.observe(place));
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => drawn.forEach((draw) => draw(true)), 150); });
addEventListener("beforeprint", () => $$("[data-chart]").forEach((place) => drawer(place)()));

// Tensors, and benchmark documents whose value changed.
$$("[data-tensors]").forEach((input) => {
  const i = input.dataset.tensors, { tensors } = DATA.builds[i], place = document.getElementById(`tensors-${i}`);
  const columns = [
    { label: "Tensor", mono: true, value: (t) => t.name, text: (t) => t.name },
    { label: "Block", number: true, value: (t) => t.layer, text: (t) => String(t.layer) },
    { label: "Component", value: (t) => t.component, text: (t) => t.component },
    { label: "Stored as", value: (t) => t.dtype, text: (t) => `${t.dtype} ${t.shape.join(" × ")}` },
    { label: "Strength", number: true, value: (t) => t.strength, text: (t) => number(t.strength) },
    { label: "Size of change", number: true, value: (t) => t.change, text: (t) => small(t.change) },
    { label: "Leak", number: true, value: (t) => t.leak, text: (t) => small(t.leak) },
    { label: "Off from |1 − s|", number: true, value: (t) => t.off, text: (t) => small(t.off) },
  ];
  const fill = () => longTable(columns, tensors.filter((t) => t.name.includes(input.value)), place, 20);
  input.addEventListener("input", fill);
  fill();
});
$$("[data-flips]").forEach((select) => {
  const i = select.dataset.flips, { flipped } = DATA.builds[i];
  const way = $(`[data-flips-way="${i}"]`), place = document.getElementById(`flips-${i}`);
  options(select, Object.keys(flipped).map((task) => [task, `${task} (${flipped[task].length})`]));
  const columns = [
    { label: "Document", number: true, value: (d) => d[0], text: (d) => String(d[0]) },
    { label: "Filter", value: (d) => d[1], text: (d) => d[1] },
    { label: "Base", number: true, value: (d) => d[2], text: (d) => number(d[2]) },
    { label: "Edited", number: true, value: (d) => d[3], text: (d) => number(d[3]) },
    { label: "Change", value: (d) => d[3] - d[2], text: (d) => element("span", { class: d[3] > d[2] ? "up" : "down" }, d[3] > d[2] ? "gained" : "lost") },
    { label: "Gold answer, nats", number: true, value: (d) => (d[4] === null ? null : d[5] - d[4]),
      text: (d) => (d[4] === null ? "–" : `${number(d[4], 2)} → ${number(d[5], 2)}`) },
  ];
  const said = ["Base said", "Edited said"].map((label, i) => (
    { label, value: (d) => d[6 + i], text: (d) => element("details", {}, element("summary", {}, "conversation"), element("pre", {}, d[6 + i])) }));
  const fill = () => {
    const rows = (flipped[select.value] || []).filter((d) => !way.value || (d[3] > d[2]) === (way.value === "gained"));
    const isTalk = rows.length && rows[0][6] !== null;
    if (rows.length) longTable(isTalk ? [...columns.slice(0, 5), ...said] : columns, rows, place, 20);
    else place.replaceChildren(element("p", { class: "hint" }, "No document flipped."));
  };
  [select, way].forEach((input) => input.addEventListener("change", fill));
  fill();
});
