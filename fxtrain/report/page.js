"use strict";
// Draws the curves. They are drawn at the width there is, and again when it changes, so that text stays readable.
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#1f6feb", "#e0731d", "#2f9e44", "#c2255c", "#7048e8", "#0b8f9c", "#a07514", "#868e96"];
const MARKS = {
  improved: ["#2f9e44", "●"], saved: ["#868e96", "▴"], skipped: ["#e0731d", "✕"], stopped: ["#c2255c", "■"],
  rewound: ["#7048e8", "↶"], interrupted: ["#c2255c", "‖"], resumed: ["#0b8f9c", "▸"],
};
const HEIGHT = 190, LEFT = 46, RIGHT = 8, TOP = 16, BOTTOM = 20;
const view = { smooth: 0, log: false, hidden: new Set() };

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
const short = (x) => {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e4 && size < 1e15) return Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(x);
  return size < 1e-3 || size >= 1e15 ? x.toExponential(1) : String(Number(x.toPrecision(4)));
};

// The debiased exponential mean; gaps stay gaps.
function smoothed(values, weight) {
  if (!weight) return values;
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
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step) found.push(Math.abs(x) < step * 1e-9 ? 0 : x);
  return found;
}

function chart(panel) {
  const box = element("div", "chart");
  box.append(element("h3", "", panel.title));
  const legend = element("div", "legend");
  if (panel.series.length > 1)
    panel.series.forEach((series, i) => {
      const item = element("span", "");
      const swatch = element("i", "");
      swatch.style.background = COLORS[i % COLORS.length];
      item.append(swatch, series.name);
      legend.append(item);
    });
  let drawn = null;
  const draw = () => {
    const width = box.clientWidth - 19;
    if (width <= 0) return;
    const all = panel.series.flatMap((s) => smoothed(s.values, view.smooth)).filter((v) => v !== null);
    const log = view.log && all.length > 0 && all.every((v) => v > 0);
    const scale = (v) => (log ? Math.log10(v) : v);
    let low = Math.min(...all.map(scale)), high = Math.max(...all.map(scale));
    if (!all.length) [low, high] = [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    [low, high] = [low - room, high + room];
    const steps = panel.series.flatMap((s) => [s.steps[0], s.steps[s.steps.length - 1]]);
    const first = Math.min(...steps), last = Math.max(Math.max(...steps), first + 1);
    const x = (step) => LEFT + ((step - first) / (last - first)) * (width - LEFT - RIGHT);
    const y = (v) => HEIGHT - BOTTOM - ((scale(v) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const plot = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": panel.title });
    for (const tick of ticks(low, high, 4)) {
      const at = HEIGHT - BOTTOM - ((tick - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
      plot.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: at, y2: at, stroke: "currentColor", "stroke-opacity": 0.12 }));
      plot.append(svg("text", { x: LEFT - 5, y: at + 4, "text-anchor": "end" }, short(log ? 10 ** tick : tick)));
    }
    for (const tick of ticks(first, last, Math.max(2, Math.floor(width / 90))))
      plot.append(svg("text", { x: x(tick), y: HEIGHT - 5, "text-anchor": "middle" }, short(tick)));
    for (const mark of data.marks) {
      if (view.hidden.has(mark.kind) || mark.step < first || mark.step > last) continue;
      const [color, sign] = MARKS[mark.kind];
      if (mark.kind === "saved") {
        plot.append(svg("line", { x1: x(mark.step), x2: x(mark.step), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM - 5, stroke: color }));
        continue;
      }
      plot.append(svg("line", { x1: x(mark.step), x2: x(mark.step), y1: TOP, y2: HEIGHT - BOTTOM, stroke: color, "stroke-opacity": 0.35, "stroke-dasharray": "2 3" }));
      const at = svg("text", { x: x(mark.step), y: TOP - 4, "text-anchor": "middle" }, sign);
      at.style.fill = color;
      plot.append(at);
    }
    panel.series.forEach((series, i) => {
      const color = COLORS[i % COLORS.length];
      const line = (values, opacity) => {
        let path = "", pen = "M";
        values.forEach((v, at) => {
          if (v === null || (log && v <= 0)) return void (pen = "M");
          path += `${pen}${x(series.steps[at]).toFixed(1)},${y(v).toFixed(1)}`;
          pen = "L";
        });
        plot.append(svg("path", { d: path, fill: "none", stroke: color, "stroke-width": 1.6, "stroke-opacity": opacity, "stroke-linejoin": "round" }));
      };
      if (view.smooth) line(series.values, 0.22);
      line(smoothed(series.values, view.smooth), 1);
      if (series.steps.length < 40)
        series.values.forEach((v, at) => v !== null && !(log && v <= 0) && plot.append(svg("circle", { cx: x(series.steps[at]), cy: y(v), r: 2.2, fill: color })));
    });
    plot.addEventListener("pointermove", (event) => tell(event, width, first, last));
    plot.addEventListener("pointerleave", () => box.querySelector(".tip")?.remove());
    if (drawn) drawn.replaceWith(plot);
    else box.append(plot, legend);
    drawn = plot;
  };
  const tell = (event, width, first, last) => {
    const across = event.clientX - drawn.getBoundingClientRect().left;
    const step = first + ((across - LEFT) / (width - LEFT - RIGHT)) * (last - first);
    const near = (steps) => steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
    const lines = panel.series.map((s) => {
      const i = near(s.steps);
      return `${s.name} ${s.values[i] === null ? "not finite" : short(s.values[i])} at ${s.steps[i]}`;
    });
    const reach = ((last - first) * 6) / (width - LEFT - RIGHT);
    for (const mark of data.marks)
      if (!view.hidden.has(mark.kind) && Math.abs(mark.step - step) <= reach && lines.length < 7) lines.push(`${MARKS[mark.kind][1]} ${mark.step} ${mark.kind}: ${mark.text}`);
    const tip = box.querySelector(".tip") ?? box.appendChild(element("div", "tip"));
    tip.textContent = lines.join("\n");
    tip.style.top = `${HEIGHT * 0.3}px`;
    const right = across > width / 2;
    tip.style.left = right ? "" : `${across + 24}px`;
    tip.style.right = right ? `${width - across + 24}px` : "";
  };
  return { box, draw };
}

// Steps go to the right, values up; the darker, the more of them.
function heat(name, found) {
  const box = element("div", "chart");
  box.append(element("h3", "", name));
  const canvas = element("canvas", "");
  const note = element("div", "legend", `${short(found.edges[0])} at the bottom, ${short(found.edges[found.edges.length - 1])} at the top; steps ${found.steps[0]} to ${found.steps[found.steps.length - 1]}`);
  box.append(canvas, note);
  const draw = () => {
    canvas.width = found.steps.length;
    canvas.height = found.edges.length - 1;
    canvas.style.height = "150px";
    canvas.style.imageRendering = "pixelated";
    const pen = canvas.getContext("2d");
    found.counts.forEach((counts, column) => {
      const most = Math.max(...counts, 1e-12);
      counts.forEach((count, row) => {
        pen.fillStyle = `rgba(31, 111, 235, ${Math.sqrt(count / most)})`;
        pen.fillRect(column, canvas.height - 1 - row, 1, 1);
      });
    });
  };
  return { box, draw };
}

const charts = [];
const place = document.getElementById("charts");
const section = (title, made) => {
  if (!made.length) return;
  const here = element("section", ""), grid = element("div", "grid");
  here.append(element("h2", "", title), grid);
  place.append(here);
  made.forEach((each) => grid.append(each.box));
  charts.push(...made);
};
data.sections.forEach((each) => section(each.title, each.panels.map(chart)));
section("Histograms", Object.entries(data.histograms).map(([name, found]) => heat(name, found)));
const redraw = () => charts.forEach((each) => each.draw());

const tools = document.getElementById("tools");
const slider = Object.assign(element("input", ""), { type: "range", min: 0, max: 0.99, step: 0.01, value: 0 });
slider.addEventListener("input", () => { view.smooth = Number(slider.value); redraw(); });
const logs = Object.assign(element("input", ""), { type: "checkbox" });
logs.addEventListener("change", () => { view.log = logs.checked; redraw(); });
const labelled = (text, input) => {
  const label = element("label", "");
  label.append(input, text);
  return label;
};
tools.append(labelled("smoothing", slider), labelled("log scale", logs));
for (const kind of Object.keys(MARKS)) {
  const count = data.marks.filter((mark) => mark.kind === kind).length;
  if (!count) continue;
  const box = Object.assign(element("input", ""), { type: "checkbox", checked: true });
  box.addEventListener("change", () => { view.hidden[box.checked ? "delete" : "add"](kind); redraw(); });
  const label = labelled(` ${kind} (${count})`, box);
  const sign = element("b", "", MARKS[kind][1]);
  sign.style.color = MARKS[kind][0];
  box.after(sign);
  tools.append(label);
}
new ResizeObserver(redraw).observe(place);
