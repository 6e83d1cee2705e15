// Assembles the page: sections of panels, samples by step, options and links to sections.
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const found = panels.find((each) => each.box === target);
    found.visible = isIntersecting;
    if (isIntersecting && found.stale) found.draw();
  }
}, { rootMargin: "300px" });
const section = (place, title, made) => {
  if (!made.length) return;
  const here = element("section", ""), grid = element("div", "grid");
  here.append(element("h2", "", title), grid);
  place.append(here);
  for (const [name, kind] of made) {
    const each = panel(name, kind);
    each.stale = true;
    if (kind.element) each.box.append(kind.element);
    grid.append(each.box);
    panels.push(each);
    observer.observe(each.box);
  }
};
const [beginning, rest] = ["first", "rest"].map((id) => document.getElementById(id));
for (const { title, panels: found } of data.sections) section(title === "Curves" ? beginning : rest, title, found.map((each) => [each.title, curves(each)]));
section(rest, "Histograms", data.histograms.map((each) => [COMPARED ? `${each.name}, ${data.runs[each.run].name}` : each.name, heat(each)]));
// The observer reports only after the first frame.
for (const each of panels.filter(({ box }) => box.getBoundingClientRect().top < innerHeight)) {
  each.visible = true;
  each.draw();
}
const redraw = () => panels.forEach((each) => each.draw());

document.querySelectorAll("table.runs tbody td:first-child").forEach((cell, i) => cell.prepend(swatch(colorOf(i))));
document.querySelectorAll(".bars [data-run]").forEach((bar) => (bar.style.background = colorOf(Number(bar.dataset.run))));

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
const choice = (text, act, checked = false) => {
  const box = Object.assign(element("input", ""), { type: "checkbox", checked });
  box.addEventListener("change", () => { act(box.checked); redraw(); });
  return labelled(text, box);
};
// A checkbox that hides a run or a kind of mark.
const toggle = (text, key, sign, color) => {
  const label = choice(` ${text}`, (on) => view.hidden[on ? "delete" : "add"](key), true);
  const shown = element("b", "", sign);
  shown.style.color = color;
  label.querySelector("input").after(shown);
  return label;
};
if (data.sections.length) {
  const tools = document.getElementById("tools");
  const units = ["step", "epoch", "time"].filter((unit) => unit === "step" || data.runs.some((run) => run[unit]));
  if (units.length > 1) {
    const select = element("select");
    select.append(...units.map((unit) => new Option(unit, unit)));
    select.addEventListener("change", () => { [view.x, view.range] = [select.value, null]; setRange(null); redraw(); });
    const label = labelled("", select);
    label.prepend("x axis");
    tools.append(label);
  }
  const slider = Object.assign(element("input", ""), { type: "range", min: 0, max: 0.99, step: 0.01, value: view.smooth });
  slider.addEventListener("input", () => { view.smooth = Number(slider.value); redraw(); });
  tools.append(labelled("smoothing", slider), choice("log scale", (on) => (view.log = on)), choice("outliers", (on) => (view.all = on)));
  for (const [kind, [color, sign]] of Object.entries(MARKS))
    if (data.counts[kind]) tools.append(toggle(`${kind} (${data.counts[kind]})`, kind, sign, COMPARED ? "" : color));
  if (COMPARED) tools.append(...data.runs.map((run, i) => toggle(run.name, i, "━", colorOf(i))));
  const whole = Object.assign(element("button", "", "show the whole range"), { type: "button", id: "whole", hidden: true });
  whole.addEventListener("click", () => setRange(null));
  tools.append(whole);
}
let width = document.body.clientWidth;
// The observer also reports height changes caused by drawing, which must not trigger another redraw.
new ResizeObserver(() => {
  if (width === document.body.clientWidth) return;
  width = document.body.clientWidth;
  requestAnimationFrame(redraw);
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => panels.forEach((each) => { each.visible = true; if (each.stale) each.draw(); }));
