"use strict";
// Draws curves and histograms at the width of the window, and again when it changes, so that text stays readable.
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#1f6feb", "#e0731d", "#2f9e44", "#c2255c", "#7048e8", "#0b8f9c", "#a07514", "#868e96"];
// Where marks overlap, the sign of the first of these kinds is shown. The tooltip lists all of them.
const MARKS = {
  stopped: ["#d6336c", "■"], interrupted: ["#d6336c", "‖"], rewound: ["#7048e8", "↶"], skipped: ["#e0731d", "✕"],
  resumed: ["#0b8f9c", "▸"], improved: ["#2f9e44", "●"], saved: ["#868e96", "▴"],
};
const LINELESS = ["improved", "saved"]; // too frequent for vertical lines
const HEIGHT = 190, LEFT = 46, RIGHT = 10, TOP = 18, BOTTOM = 20;
const LONG = 100; // points; shorter curves are not smoothed
const LINES = 40; // with more marks, no vertical lines are drawn
const LARGEST = 1e300; // larger values are clamped
const DENSE = data.sections.some((each) => each.panels.some((panel) => panel.series.some((series) => series.values.length > 4 * LONG)));
const view = { smooth: DENSE ? 0.8 : 0, log: false, all: false, hidden: new Set() };

const svg = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const element = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const short = (x, digits = 4) => {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e4 && size < 1e15) return Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: digits }).format(x);
  if (size >= 1e-3 && size < 1e4) return String(Number(x.toPrecision(digits)));
  return Number(x.toPrecision(digits)).toExponential().replace("e+", "e");
};
// A tick has enough digits to differ from the next.
const tickText = (x, step) => short(x, Math.max(1, Math.ceil(Math.log10(Math.abs(x) / step || 1) + 1e-9) + 1));
const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

// Bias-corrected exponential moving average. Gaps are preserved.
function smoothed(values, weight) {
  if (!weight || values.length < LONG) return values;
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + value;
    total = weight * total + 1;
    return sum / total;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999) ?? rough;
  const found = [], begin = Math.ceil(low / step - 1e-9);
  // Bounded by a counter, because an index beyond 2**53 would not change when incremented.
  for (let i = 0; i <= 2 * count && (begin + i) * step <= high + step * 1e-9; i++) found.push((begin + i) * step);
  return { found: [...new Set(found)], step };
}

// The range of values without extreme outliers, which would flatten the rest of the curve.
function usual(values) {
  const sorted = values.slice().sort((a, b) => a - b), count = sorted.length;
  if (!count) return [0, 1];
  const [least, most] = [sorted[0], sorted[count - 1]];
  if (view.all || count < 20) return [least, most];
  const cut = Math.max(1, Math.floor(count * 0.01));
  const [low, high] = [sorted[cut], sorted[count - 1 - cut]];
  const far = 2 * (high - low);
  return far > 0 ? [least < low - far ? low : least, most > high + far ? high : most] : [least, most];
}

// A label below the axis, kept inside the plot.
const label = (plot, x, y, width, text) => plot.append(svg("text", { x: Math.min(x, width - 3.5 * text.length), y, "text-anchor": "middle" }, text));

let charts = 0;
function chart(panel) {
  const box = element("div", "chart"), clip = `clip${charts++}`;
  box.append(element("h3", "", panel.title));
  const color = (series, i) => (series.name === "train" ? COLORS[0] : series.name === "eval" ? COLORS[1] : COLORS[i % COLORS.length]);
  const legend = element("div", "legend");
  panel.series.forEach((series, i) => {
    const item = element("span", ""), swatch = element("i", "");
    swatch.style.background = color(series, i);
    const last = series.values.findLast((v) => v !== null);
    item.append(swatch, panel.series.length > 1 || series.name !== panel.title ? series.name : "last", element("b", "", last === undefined ? "not finite" : short(last)));
    legend.append(item);
  });
  const [first, end] = extent(panel.series.flatMap((s) => [s.steps[0], s.steps[s.steps.length - 1]]));
  const last = Math.max(end, first + 1);
  let drawn = null;
  const draw = () => {
    const width = box.clientWidth - 19;
    if (width <= LEFT + RIGHT) return;
    const lines = panel.series.map((s) => smoothed(s.values, view.smooth));
    const all = panel.series.flatMap((s) => s.values.filter((v) => v !== null));
    const log = view.log && all.length > 0 && all.every((v) => v > 0);
    // Differences of larger values overflow.
    const scale = (v) => (log ? Math.log10(v) : Math.max(-LARGEST, Math.min(LARGEST, v)));
    let [low, high] = usual(all.map(scale));
    const room = (high - low || Math.abs(high) * 0.1 || 1) * 0.05;
    [low, high] = [low - room, high + room];
    const x = (step) => LEFT + ((step - first) / (last - first)) * (width - LEFT - RIGHT);
    const up = (v) => HEIGHT - BOTTOM - ((v - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const y = (v) => Math.max(-HEIGHT, Math.min(2 * HEIGHT, up(scale(v))));
    const plot = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": panel.title });
    const frame = svg("clipPath", { id: clip });
    frame.append(svg("rect", { x: LEFT, y: TOP - 3, width: width - LEFT - RIGHT + 3, height: HEIGHT - TOP - BOTTOM + 6 }));
    plot.append(frame);
    const { found, step } = ticks(low, high, 4);
    for (const tick of found) {
      plot.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: up(tick), y2: up(tick), stroke: "currentColor", "stroke-opacity": 0.12 }));
      plot.append(svg("text", { x: LEFT - 5, y: up(tick) + 4, "text-anchor": "end" }, log ? short(10 ** tick, 2) : tickText(tick, step)));
    }
    const along = ticks(first, last, Math.max(2, Math.floor(width / 80)));
    for (const tick of along.found)
      if (Number.isInteger(tick)) label(plot, x(tick), HEIGHT - 5, width, tickText(tick, along.step));
    marks(plot, x, first, last);
    const inside = svg("g", { "clip-path": `url(#${clip})` });
    plot.append(inside);
    panel.series.forEach((series, i) => {
      const line = (values, opacity) => {
        let path = "", pen = "M";
        values.forEach((v, at) => {
          if (v === null) return void (pen = "M");
          path += `${pen}${x(series.steps[at]).toFixed(1)},${y(v).toFixed(1)}`;
          pen = "L";
        });
        inside.append(svg("path", { d: path, fill: "none", stroke: color(series, i), "stroke-width": 1.6, "stroke-opacity": opacity, "stroke-linejoin": "round" }));
      };
      if (lines[i] !== series.values) line(series.values, 0.22);
      line(lines[i], 1);
      if (series.steps.length < 40)
        lines[i].forEach((v, at) => v !== null && inside.append(svg("circle", { cx: x(series.steps[at]), cy: y(v), r: 2.2, fill: color(series, i) })));
    });
    plot.addEventListener("pointermove", (event) => tell(event, width));
    plot.addEventListener("pointerleave", () => box.querySelector(".tip")?.remove());
    if (drawn) drawn.replaceWith(plot);
    else box.append(plot, legend);
    drawn = plot;
  };
  const tell = (event, width) => {
    const across = event.clientX - drawn.getBoundingClientRect().left;
    const step = first + ((across - LEFT) / (width - LEFT - RIGHT)) * (last - first);
    const near = (steps) => steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
    const lines = panel.series.map((s) => {
      const i = near(s.steps);
      return `${s.name} ${s.values[i] === null ? "not finite" : short(s.values[i])} at step ${s.steps[i]}`;
    });
    const reach = ((last - first) * 6) / (width - LEFT - RIGHT);
    const close = data.marks.filter((mark) => !view.hidden.has(mark.kind) && Math.abs(mark.step - step) <= reach);
    for (const mark of close.slice(0, 6)) lines.push(`${MARKS[mark.kind][1]} step ${mark.step} ${mark.kind}: ${mark.text}`);
    const tip = box.querySelector(".tip") ?? box.appendChild(element("div", "tip"));
    tip.textContent = lines.join("\n");
    tip.style.top = `${HEIGHT * 0.3}px`;
    const right = across > width / 2;
    tip.style.left = right ? "" : `${across + 24}px`;
    tip.style.right = right ? `${width - across + 24}px` : "";
  };
  return { box, draw };
}

// Draws one sign for marks that overlap. Checkpoints are ticks at the bottom.
function marks(plot, x, first, last) {
  const signs = [], saved = [], rank = Object.keys(MARKS);
  const free = (taken, at, room) => taken.every((other) => Math.abs(other - at) >= room) && taken.push(at);
  const shown = data.marks.filter((mark) => !view.hidden.has(mark.kind) && mark.step >= first && mark.step <= last);
  const lined = shown.filter((mark) => !LINELESS.includes(mark.kind)).length <= LINES;
  for (const mark of shown.sort((a, b) => rank.indexOf(a.kind) - rank.indexOf(b.kind))) {
    const [color, sign] = MARKS[mark.kind], at = x(mark.step), bottom = HEIGHT - BOTTOM;
    if (mark.kind === "saved") {
      if (free(saved, at, 3)) plot.append(svg("line", { class: "mark saved", x1: at, x2: at, y1: bottom, y2: bottom - 5, stroke: color }));
      continue;
    }
    if (!free(signs, at, 9)) continue;
    if (lined && !LINELESS.includes(mark.kind))
      plot.append(svg("line", { x1: at, x2: at, y1: TOP - 2, y2: bottom, stroke: color, "stroke-opacity": 0.45, "stroke-dasharray": "2 3" }));
    const node = svg("text", { class: `mark ${mark.kind}`, x: at, y: TOP - 6, "text-anchor": "middle" }, sign);
    node.style.fill = color;
    plot.append(node);
  }
}

// Draws a heat map with steps on the x axis, values on the y axis, and counts as opacity.
function heat(name, found) {
  const box = element("div", "chart");
  box.append(element("h3", "", name));
  const rows = found.edges.length - 1, columns = found.steps.length;
  const cells = element("canvas", "");
  [cells.width, cells.height] = [columns, rows];
  let drawn = null;
  const draw = () => {
    const width = box.clientWidth - 19;
    if (width <= LEFT + RIGHT) return;
    const pen = cells.getContext("2d");
    pen.clearRect(0, 0, columns, rows);
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    found.counts.forEach((counts, column) => {
      const most = extent(counts)[1];
      counts.forEach((count, row) => {
        pen.globalAlpha = most > 0 ? Math.sqrt(count / most) : 0;
        pen.fillRect(column, rows - 1 - row, 1, 1);
      });
    });
    const plot = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": name });
    const [wide, high] = [width - LEFT - RIGHT, HEIGHT - BOTTOM - 6];
    const image = svg("image", { x: LEFT, y: 6, width: wide, height: high, href: cells.toDataURL(), preserveAspectRatio: "none" });
    image.style.imageRendering = "pixelated";
    plot.append(image);
    const labels = Math.min(rows, 5);
    for (let i = 0; i <= labels; i++) {
      const edge = Math.round((i * rows) / labels);
      plot.append(svg("text", { x: LEFT - 5, y: Math.min(6 + high * (1 - edge / rows) + 4, 6 + high), "text-anchor": "end" }, short(found.edges[edge], 2)));
    }
    const every = Math.max(1, Math.ceil(columns / Math.max(2, Math.floor(wide / 60))));
    found.steps.forEach((step, i) => {
      if (i % every === 0) label(plot, LEFT + ((i + 0.5) * wide) / columns, HEIGHT - 2, width, short(step));
    });
    if (drawn) drawn.replaceWith(plot);
    else box.append(plot);
    drawn = plot;
  };
  return { box, draw };
}

const all = [];
const [beginning, rest] = ["first", "rest"].map((id) => document.getElementById(id));
const section = (place, title, made) => {
  if (!made.length) return;
  const here = element("section", ""), grid = element("div", "grid");
  here.append(element("h2", "", title), grid);
  place.append(here);
  made.forEach((each) => grid.append(each.box));
  all.push(...made);
};
const heats = Object.entries(data.histograms).map(([name, found]) => heat(name, found));
data.sections.forEach((each, i) => section(each.title === "Curves" ? beginning : rest, each.title, each.panels.map(chart)));
section(rest, "Histograms", heats);
const redraw = () => all.forEach((each) => each.draw());

// Shows samples of several steps one at a time, selected by a slider.
for (const steps of document.querySelectorAll(".steps")) {
  const figures = [...steps.children];
  if (figures.length < 2) continue;
  const slider = Object.assign(element("input", ""), { type: "range", min: 0, max: figures.length - 1, value: figures.length - 1 });
  slider.setAttribute("aria-label", "step");
  const caption = element("span", ""), choose = element("div", "choose");
  const show = () => {
    figures.forEach((figure, i) => (figure.hidden = i !== Number(slider.value)));
    caption.textContent = figures[slider.value].querySelector("figcaption").textContent;
  };
  figures.forEach((figure) => (figure.querySelector("figcaption").hidden = true));
  slider.addEventListener("input", show);
  choose.append(slider, caption);
  steps.before(choose);
  show();
}
// Large images are scaled smoothly, small ones as pixels.
for (const image of document.images) image.decode().then(() => image.classList.toggle("large", image.naturalWidth > 128), () => {});

const nav = element("nav", "");
document.querySelectorAll("main section").forEach((each, i) => {
  each.id = `section${i}`;
  nav.append(Object.assign(element("a", "", each.querySelector("h2").textContent), { href: `#section${i}` }));
});
document.querySelector("header").append(nav);

const labelled = (text, input) => {
  const label = element("label", "");
  label.append(input, text);
  return label;
};
const choice = (text, act) => {
  const box = Object.assign(element("input", ""), { type: "checkbox" });
  box.addEventListener("change", () => { act(box.checked); redraw(); });
  return labelled(text, box);
};
if (all.length > heats.length) {
  const slider = Object.assign(element("input", ""), { type: "range", min: 0, max: 0.99, step: 0.01, value: view.smooth });
  slider.addEventListener("input", () => { view.smooth = Number(slider.value); redraw(); });
  const tools = document.getElementById("tools");
  tools.append(labelled("smoothing", slider), choice("log scale", (on) => (view.log = on)), choice("outliers", (on) => (view.all = on)));
  for (const [kind, [color, sign]] of Object.entries(MARKS)) {
    if (!data.counts[kind]) continue;
    const label = choice(` ${kind} (${data.counts[kind]})`, (on) => view.hidden[on ? "delete" : "add"](kind));
    const shown = element("b", "", sign), box = label.querySelector("input");
    box.checked = true;
    shown.style.color = color;
    box.after(shown);
    tools.append(label);
  }
}
redraw();
// The observer also reports height changes caused by drawing, which must not trigger another redraw.
let width = 0;
new ResizeObserver(() => {
  if (width === document.body.clientWidth) return;
  width = document.body.clientWidth;
  requestAnimationFrame(redraw);
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
