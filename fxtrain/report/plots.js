// The plots of panels: curves with marks, and histograms.
const swatch = (color, dashed) => {
  const made = element("i", dashed ? "dashed" : "");
  made.style.color = color;
  return made;
};
const tipLine = (text, color, dashed) => {
  const line = element("div");
  if (color) line.append(swatch(color, dashed));
  line.append(text);
  return line;
};

// Curves of one panel. Runs, series and marks may be hidden.
function curves(spec) {
  const labels = new Set(spec.series.map((each) => each.name));
  const hidden = new Set();
  const series = spec.series.map((each, i) => ({
    ...each,
    label: !COMPARED ? each.name : labels.size > 1 ? `${data.runs[each.run].name}, ${each.name}` : data.runs[each.run].name,
    color: colorOf(COMPARED ? each.run : each.name === "train" ? 0 : each.name === "eval" ? 1 : i),
    dashed: COMPARED && each.name === "eval" && labels.size > 1,
    last: each.values.findLast((value) => value !== null),
  }));
  const drawn = () => series.filter((each) => !hidden.has(each) && !view.hidden.has(each.run) && along(each.run, 0) !== null);
  let lines = [], steps = new Map();
  const legend = element("div", "legend");
  series.forEach((each) => {
    const item = Object.assign(element("button"), { type: "button", title: "Show or hide" });
    const alone = !COMPARED && series.length === 1 && each.name === spec.title;
    item.append(swatch(each.color, each.dashed), alone ? "last" : each.label, element("b", "", each.last === undefined ? "not finite" : short(each.last)));
    item.addEventListener("click", () => {
      if (!hidden.delete(each)) hidden.add(each);
      item.classList.toggle("off", hidden.has(each));
      panels.filter((shown) => shown.kind === kind).forEach((shown) => shown.draw());
    });
    legend.append(item);
  });
  const kind = {
    shared: true,
    element: legend,
    legend: () => drawn().map(({ label, color, last }) => ({ text: `${label} ${last === undefined ? "" : short(last)}`, color })),
    rows: () => [["run", "metric", "step", "epoch", "seconds", "value"], ...drawn().flatMap((each) => each.steps.map((step, i) => [
      data.runs[each.run].name, labels.size > 1 || COMPARED ? `${spec.title} ${each.name}` : spec.title, step, along(each.run, step, "epoch"), along(each.run, step, "time"), each.values[i],
    ]))],
    make(width, height, hover) {
      const shown = drawn();
      const values = shown.flatMap((each) => each.values.filter((value) => value !== null));
      const log = view.log && values.length > 0 && values.every((value) => value > 0);
      const size = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      // In units in which uPlot can compute differences.
      const unit = !log && size && (size > 1e12 || size < 1e-9) ? 10 ** Math.max(-300, Math.min(300, Math.floor(Math.log10(size)))) : 1;
      const scaled = (value) => (value === null ? null : log ? Math.log10(value) : Math.max(-LARGEST, Math.min(LARGEST, value)) / unit);
      const text = (value, step) => (log ? short(10 ** value, step < 0.3 ? 3 : 1) : tickText(value * unit, step * unit));
      steps = new Map();
      lines = shown.flatMap((each) => {
        const xs = each.steps.map((step) => along(each.run, step));
        xs.forEach((x, i) => steps.set(x, each.steps[i]));
        const smooth = smoothed(each.values, view.smooth), isRaw = smooth === each.values;
        const line = (values, more) => ({ each, values, table: [xs, values.map(scaled)], width: 1.7, ...more });
        return isRaw ? [line(smooth)] : [line(each.values, { faint: true, width: 1 }), line(smooth)];
      });
      const [least, end] = extent(lines.flatMap(({ table: [xs] }) => [xs[0], xs[xs.length - 1]]));
      const whole = lines.length ? [least, end > least ? end : least + 1] : [0, 1];
      const y = (u) => {
        const [low, high] = usual(lines.flatMap((_, i) => {
          const [from, to] = u.series[i + 1].idxs ?? [0, -1];
          return u.data[i + 1].slice(from, to + 1).filter((value) => value !== null && value !== undefined);
        }));
        const room = (high - low || Math.abs(high) * 0.1 || 1) * 0.05;
        return [low - room, high + room];
      };
      return new uPlot({
        width, height, padding: [18, 14, 0, 0], legend: { show: false },
        scales: { x: { time: false, range: () => view.range ?? whole }, y: { range: y } },
        axes: axes({
          splits: (u, i, min, max) => {
            const { found } = ticks(min, max, Math.max(2, Math.floor(width / 85)), view.x === "time" && max - min > 4 ? SECONDS : undefined);
            return view.x === "step" ? found.filter(Number.isInteger) : found;
          },
          values: (u, splits) => splits.map((x, i) => (view.x === "time" ? duration(x) : tickText(x, splits[1] - splits[0] || 1))),
        }, {
          splits: (u, i, min, max) => ticks(min, max, height / 45).found,
          values: (u, splits) => splits.map((value) => text(value, splits[1] - splits[0] || 1)),
        }),
        series: [{}, ...lines.map(({ each, faint, width }) => ({
          stroke: each.color, width, alpha: faint ? 0.25 : 1, dash: each.dashed ? [6, 4] : undefined, scale: "y",
          points: faint || each.steps.length >= 40 ? { show: false } : { show: true, size: 5, fill: each.color },
        }))],
        cursor: {
          y: false, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => setRange(null) },
          // The nearest point of each series, because not all have a value at each step.
          dataIdx: (u, i, at, x) => (i && lines[i - 1].faint ? null : nearest(u, i, at, x)),
          points: { size: 6 },
        },
        hooks: {
          setCursor: [hover],
          draw: [(u) => drawMarks(u, shown)],
          setSelect: [(u) => {
            const { left, width } = u.select;
            if (width > 4) setRange([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
            u.setSelect({ left: 0, width: 0 }, false);
          }],
        },
      }, lines.length ? uPlot.join(lines.map(({ table }) => table)) : [[]]);
    },
    tell(u) {
      const at = u.cursor.idx;
      if (at === null || at === undefined) return [];
      const x = u.data[0][at], step = steps.get(x), units = COMPARED ? [] : ["epoch", "time"].filter((unit) => unit !== view.x && data.runs[0][unit]);
      const heads = [`${view.x === "time" ? "" : `${view.x} `}${FORMATS[view.x](x)}`];
      if (view.x !== "step" && !COMPARED) heads.push(`step ${FORMATS.step(step)}`);
      const found = [tipLine([...heads, ...units.map((unit) => `${unit === "epoch" ? "epoch " : ""}${FORMATS[unit](along(0, step, unit))}`)].join(", "))];
      lines.forEach(({ each, values, faint, table: [xs] }, i) => {
        const index = u.cursor.idxs[i + 1];
        if (faint || index === null || index === undefined) return;
        const own = xs.indexOf(u.data[0][index]);
        found.push(tipLine(`${each.label} ${values[own] === null ? "not finite" : short(values[own])}${index === at ? "" : ` at step ${FORMATS.step(each.steps[own])}`}`, each.color, each.dashed));
      });
      const reach = u.posToVal(6, "x") - u.posToVal(0, "x");
      const close = visibleMarks().filter((mark) => Math.abs(mark.x - x) <= reach);
      return [...found, ...close.slice(0, 6).map((mark) =>
        tipLine(`${MARKS[mark.kind][1]} step ${mark.step} ${mark.kind}: ${mark.text}`, COMPARED && colorOf(mark.run)))];
    },
  };
  return kind;
}

function nearest(u, i, at, x) {
  const values = u.data[i], xs = u.data[0];
  if (values[at] !== undefined) return at;
  let [low, high] = [at, at];
  while (low >= 0 && values[low] === undefined) low--;
  while (high < values.length && values[high] === undefined) high++;
  if (low < 0) return high < values.length ? high : null;
  return high >= values.length || x - xs[low] <= xs[high] - x ? low : high;
}

const visibleMarks = () => data.marks
  .filter((mark) => !view.hidden.has(mark.kind) && !view.hidden.has(mark.run))
  .map((mark) => ({ ...mark, x: along(mark.run, mark.step) }))
  .filter((mark) => mark.x !== null);

// Draws one sign for marks that overlap. Checkpoints are ticks at the bottom.
function drawMarks(u, shown) {
  const { left, top, width, height } = u.bbox, ratio = uPlot.pxRatio, pen = u.ctx, signs = [], saved = [], rank = Object.keys(MARKS);
  const runs = new Set(shown.map((each) => each.run));
  const free = (taken, at, room) => taken.every((other) => Math.abs(other - at) >= room * ratio) && taken.push(at);
  const { min, max } = u.scales.x;
  const found = visibleMarks().filter((mark) => runs.has(mark.run) && mark.x >= min && mark.x <= max);
  const lined = found.filter((mark) => !LINELESS.includes(mark.kind)).length <= LINES;
  pen.save();
  pen.textAlign = "center";
  for (const mark of found.sort((a, b) => rank.indexOf(a.kind) - rank.indexOf(b.kind))) {
    const [own, sign] = MARKS[mark.kind], at = Math.round(u.valToPos(mark.x, "x", true));
    pen.fillStyle = pen.strokeStyle = COMPARED ? colorOf(mark.run) : own;
    if (mark.kind === "saved") {
      if (free(saved, at, 3)) pen.fillRect(at, top + height - 5 * ratio, ratio, 5 * ratio);
      continue;
    }
    if (!free(signs, at, 9)) continue;
    if (lined && !LINELESS.includes(mark.kind)) {
      pen.globalAlpha = 0.45;
      pen.setLineDash([2 * ratio, 3 * ratio]);
      pen.beginPath();
      pen.moveTo(at, top);
      pen.lineTo(at, top + height);
      pen.stroke();
      pen.globalAlpha = 1;
    }
    pen.font = `${(mark.kind === "improved" ? 9 : 13) * ratio}px system-ui, sans-serif`;
    pen.fillText(sign, Math.max(left, Math.min(left + width, at)), top - 4 * ratio);
  }
  pen.restore();
}

// A histogram over steps: a column for each step, a row for each bin, darker for larger counts of the step.
function heat(found) {
  const rows = found.edges.length - 1, columns = found.steps.length;
  const cells = element("canvas", "");
  [cells.width, cells.height] = [columns, rows];
  const edge = (i) => short(found.edges[i], 3);
  const few = (count, most) => Array.from({ length: count }, (_, i) => i).filter((i) => i % Math.ceil(count / most) === 0);
  return {
    legend: () => [],
    rows: () => [["run", "histogram", "step", "from", "to", "count"], ...found.steps.flatMap((step, column) => found.counts[column].map((count, row) =>
      [data.runs[found.run].name, found.name, step, found.edges[row], found.edges[row + 1], count]))],
    make(width, height, hover) {
      const pen = cells.getContext("2d");
      pen.clearRect(0, 0, columns, rows);
      pen.fillStyle = theme("--accent");
      found.counts.forEach((counts, column) => {
        const most = extent(counts)[1];
        counts.forEach((count, row) => {
          pen.globalAlpha = most > 0 ? Math.sqrt(count / most) : 0;
          pen.fillRect(column, rows - 1 - row, 1, 1);
        });
      });
      const draw = (u) => {
        const { left, top, width, height } = u.bbox;
        u.ctx.imageSmoothingEnabled = false;
        u.ctx.drawImage(cells, left, top, width, height);
      };
      return new uPlot({
        width, height, padding: [8, 14, 0, 0], legend: { show: false },
        scales: { x: { time: false, range: [-0.5, columns - 0.5] }, y: { range: [0, rows] } },
        axes: axes(
          { splits: () => few(columns, Math.max(2, width / 70)), values: (u, splits) => splits.map((i) => short(found.steps[i])), grid: { show: false } },
          { splits: () => few(rows + 1, height / 24), values: (u, splits) => splits.map(edge), grid: { show: false } },
        ),
        series: [{}, { stroke: "transparent", points: { show: false } }],
        cursor: { drag: { x: false, y: false }, points: { show: false } },
        hooks: { drawClear: [draw], setCursor: [hover] },
      }, [found.steps.map((_, i) => i), found.steps.map(() => 0)]);
    },
    tell(u) {
      const column = u.cursor.idx, row = Math.max(0, Math.min(rows - 1, Math.floor(u.posToVal(u.cursor.top, "y"))));
      if (column === null || column === undefined) return [];
      return [tipLine(`step ${FORMATS.step(found.steps[column])}`), tipLine(`${short(found.counts[column][row])} from ${short(found.edges[row])} to ${short(found.edges[row + 1])}`)];
    },
  };
}
