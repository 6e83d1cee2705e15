// A panel with a plot, its downloads, its enlargement, and its keys and gestures.
const save = (name, blob) => {
  const link = Object.assign(element("a"), { href: URL.createObjectURL(blob), download: name.replace(/[^\w.-]+/g, "_").slice(0, 80) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1e4);
};
// Spreadsheets run texts that begin with one of these signs as formulas.
const quoted = (cell) => (typeof cell === "number" ? String(cell) : `"${cell.replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`);
const csv = (rows) => new Blob([rows.map((row) => row.map((cell) => quoted(cell ?? "")).join(",")).join("\n") + "\n"], { type: "text/csv" });

// Draws a plot with its title and legend as a PNG, of the same size on all screens.
async function picture(title, kind) {
  const plot = kind.make(960, 480, () => {}), legend = kind.legend();
  await new Promise(requestAnimationFrame); // uPlot draws in a microtask
  const from = plot.ctx.canvas, ratio = uPlot.pxRatio, canvas = element("canvas"), pen = canvas.getContext("2d");
  const line = 18 * ratio, rows = [[]];
  pen.font = `${12 * ratio}px system-ui, sans-serif`;
  let right = 0;
  for (const { text, color } of legend) {
    const width = pen.measureText(text).width + 34 * ratio;
    if (right && right + width > from.width) {
      rows.push([]);
      right = 0;
    }
    rows[rows.length - 1].push({ text, color, left: right });
    right += width;
  }
  [canvas.width, canvas.height] = [from.width, from.height + line * (rows.length + 1.7)];
  pen.fillStyle = theme("--back");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = theme("--text");
  pen.font = `600 ${14 * ratio}px system-ui, sans-serif`;
  pen.fillText(title, 8 * ratio, line);
  pen.drawImage(from, 0, line * 1.4);
  pen.font = `${12 * ratio}px system-ui, sans-serif`;
  rows.forEach((row, i) => row.forEach(({ text, color, left }) => {
    const y = from.height + line * (i + 2);
    pen.fillStyle = color;
    pen.fillRect(left + 8 * ratio, y - 6 * ratio, 14 * ratio, 3 * ratio);
    pen.fillStyle = theme("--text");
    pen.fillText(text, left + 27 * ratio, y);
  }));
  plot.destroy();
  canvas.toBlob((blob) => save(`${title}.png`, blob));
}

const axes = (x, y) => {
  const look = { stroke: () => theme("--dim"), font: "11px system-ui, sans-serif", grid: { stroke: () => theme("--grid"), width: 1 }, ticks: { show: false } };
  // uPlot omits the labels of ranges beyond its own increments, so ticks are chosen here, and any range is accepted.
  const any = { space: () => 1, incrs: (u, i, min, max) => [Math.max(5, max - min)] };
  return [
    { ...look, ...any, ...x, size: 26, gap: 4 },
    { ...look, ...any, ...y, gap: 5, size: (u, values) => 14 + 6.2 * Math.max(2, ...(values ?? []).map((text) => text.length)) },
  ];
};

const panels = [];
// A panel with a title, buttons and a plot. `kind` has make(width, height, hover), legend, rows() and whether x is shared.
function panel(title, kind, height = HEIGHT) {
  const isLarge = height !== HEIGHT;
  const box = element("div", "chart"), head = element("div", "head"), place = element("div", "plot"), tip = element("div", "tip");
  place.style.height = `${height}px`;
  place.tabIndex = 0;
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", `${title}. Arrow keys read values, plus and minus zoom, 0 shows everything, Enter enlarges.`);
  const button = (text, what, act) => {
    const made = Object.assign(element("button", "", text), { title: what, type: "button" });
    made.setAttribute("aria-label", `${what}: ${title}`);
    made.addEventListener("click", act);
    return made;
  };
  head.append(element("h3", "", title),
    button("CSV", "Download the values", () => save(`${title}.csv`, csv(kind.rows()))),
    button("PNG", "Download the picture", () => picture(title, kind)));
  if (!isLarge) head.append(button("⤢", "Enlarge", () => enlarge(title, kind)));
  tip.hidden = true;
  box.append(head, place);
  const self = {
    box, plot: null, visible: isLarge, kind,
    draw() {
      const width = place.clientWidth;
      if (!self.visible || !width) return void (self.stale = true);
      self.stale = false;
      self.plot?.destroy();
      self.plot = kind.make(width, height, (u) => {
        const shown = u.cursor.left >= 0 ? kind.tell(u) : [];
        tip.hidden = !shown.length;
        tip.replaceChildren(...shown);
      });
      place.replaceChildren(self.plot.root, tip);
    },
    zoom() {
      if (!self.visible) self.stale = true;
      else if (kind.shared) self.plot?.setScale("x", { min: 0, max: 1 }); // the scale's own function gives the range
    },
  };
  place.addEventListener("keydown", (event) => {
    const u = self.plot, count = u?.data[0].length;
    if (!count || event.ctrlKey || event.metaKey) return;
    const at = u.cursor.idx ?? 0, move = { ArrowLeft: -1, ArrowRight: 1, PageUp: 20, PageDown: -20, Home: -count, End: count }[event.key];
    const x = u.data[0][Math.max(0, Math.min(count - 1, at + (move ?? 0)))];
    if (move !== undefined) u.setCursor({ left: u.valToPos(x, "x"), top: u.over.clientHeight / 2 });
    else if (kind.shared && "+=-".includes(event.key)) zoom(u, event.key === "-" ? 2 : 0.5, x);
    else if (kind.shared && event.key === "0") setRange(null);
    else if (!isLarge && event.key === "Enter" && event.target === place) enlarge(title, kind);
    else return;
    event.preventDefault();
  });
  place.addEventListener("blur", () => self.plot?.setCursor({ left: -10, top: -10 }));
  touch(place, self);
  return self;
}

const setRange = (range) => {
  view.range = range;
  document.getElementById("whole").hidden = range === null;
  panels.forEach((each) => each.zoom());
};
const zoom = (u, factor, x) => {
  const { min, max } = u.scales.x;
  setRange([x - (x - min) * factor, x + (max - x) * factor]);
};

// One finger moves the crosshair, two fingers zoom. uPlot itself listens to the mouse.
function touch(place, self) {
  const fingers = new Map();
  const across = (event) => event.clientX - self.plot.over.getBoundingClientRect().left;
  let begin = null;
  place.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch" || !self.plot) return;
    fingers.set(event.pointerId, across(event));
    begin = fingers.size === 2 && self.kind.shared ? [...fingers.values()].map((left) => self.plot.posToVal(left, "x")) : null;
  });
  place.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    fingers.set(event.pointerId, across(event));
    if (fingers.size === 1) return self.plot.setCursor({ left: across(event), top: 1 });
    const [a, b] = fingers.values(), width = self.plot.over.clientWidth;
    if (!begin || Math.abs(a - b) < 10) return;
    const scale = (begin[1] - begin[0]) / (b - a), low = begin[0] - a * scale;
    if (scale > 0) setRange([low, low + width * scale]);
  });
  for (const name of ["pointerup", "pointercancel"]) place.addEventListener(name, (event) => fingers.delete(event.pointerId));
}

function enlarge(title, kind) {
  const dialog = element("dialog"), close = Object.assign(element("button", "close", "✕"), { type: "button" });
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => dialog.close());
  const large = panel(title, kind, Math.max(HEIGHT + 1, Math.round(innerHeight * 0.65))), small = kind.element?.parentNode;
  if (small) large.box.append(kind.element);
  dialog.append(close, large.box);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    panels.splice(panels.indexOf(large), 1);
    small?.append(kind.element);
    large.plot?.destroy();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  panels.push(large);
  large.draw();
}
