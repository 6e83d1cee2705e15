"use strict";
// Draws curves and histograms with uPlot. A panel is drawn when it becomes visible, and again when an option changes.
const data = JSON.parse(document.getElementById("data").textContent);
const COMPARED = data.runs.length > 1; // colors are runs, and evaluation is dashed
const COLORS = ["#1f6feb", "#e0731d", "#2f9e44", "#c2255c", "#7048e8", "#0b8f9c", "#a07514", "#868e96"];
// Where marks overlap, the sign of the first of these kinds is shown. The tooltip lists all of them.
const MARKS = {
  stopped: ["#d6336c", "■"], interrupted: ["#d6336c", "‖"], rewound: ["#7048e8", "↶"], skipped: ["#e0731d", "✕"],
  resumed: ["#0b8f9c", "▸"], improved: ["#2f9e44", "●"], saved: ["#868e96", "▴"],
};
const LINELESS = ["improved", "saved"]; // too frequent for vertical lines
const HEIGHT = 210;
const LONG = 100; // points; shorter curves are not smoothed
const LINES = 40; // with more marks, no vertical lines are drawn
const LARGEST = 1e300; // larger values are clamped, because their differences overflow
const all = data.sections.flatMap((each) => each.panels.flatMap((panel) => panel.series));
const view = { x: "step", smooth: all.some((each) => each.values.length > 4 * LONG) ? 0.8 : 0, log: false, all: false, range: null, hidden: new Set() };

const element = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colorOf = (i) => COLORS[i] ?? `hsl(${Math.round(i * 137.5) % 360} 55% 50%)`;
const short = (x, digits = 4) => {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e4 && size < 1e15) return Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: digits }).format(x);
  if (size >= 1e-3 && size < 1e4) return String(Number(x.toPrecision(digits)));
  return Number(x.toPrecision(digits)).toExponential().replace("e+", "e");
};
// A tick has enough digits to differ from the next, and one more for multiples of 2.5.
const tickText = (x, step) => {
  const isHalf = Math.abs(step / 10 ** Math.floor(Math.log10(step)) - 2.5) < 1e-6;
  return short(x, Math.min(15, Math.max(1, Math.ceil(Math.log10(Math.abs(x) / step || 1) + 1e-9) + 1 + isHalf)));
};
const duration = (seconds) => {
  if (seconds < 10) return `${Number(seconds.toPrecision(3))} s`;
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
  return (parts[0] ? parts : parts.slice(1)).map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
};
const FORMATS = { step: (x) => x.toLocaleString("en"), epoch: (x) => short(x), time: duration };
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

// Round positions between two values.
function ticks(low, high, count, steps) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = (steps ?? [1, 2, 2.5, 5, 10].map((m) => m * power)).find((s) => s >= rough * 0.999) ?? Math.ceil(rough);
  const found = [], begin = Math.ceil(low / step - 1e-9);
  // Bounded by a counter, because an index beyond 2**53 would not change when incremented.
  for (let i = 0; i <= 2 * count && (begin + i) * step <= high + step * 1e-9; i++) found.push((begin + i) * step);
  return { found: [...new Set(found)], step };
}
const SECONDS = [1, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 604800];

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

// The position of a step on the x axis: the step, or its epoch or time by interpolation.
function along(run, step, unit = view.x) {
  if (unit === "step") return step;
  const [steps, values] = data.runs[run][unit] ?? [];
  if (!steps) return null;
  let [low, high] = [0, steps.length - 1];
  if (step <= steps[0]) return values[0];
  if (step >= steps[high]) return values[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return values[low] + ((step - steps[low]) / (steps[high] - steps[low])) * (values[high] - values[low]);
}

