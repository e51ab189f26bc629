// Shows the values of all curves at the step under the pointer. They are read back from the drawn paths, so that the page
// holds each number once. Without this script the page lacks nothing else.
"use strict";

const plots = [...document.querySelectorAll(".plot")].map((element) => ({
  element,
  svg: element.querySelector("svg"),
  readout: element.closest("figure").querySelector(".readout"),
  ...JSON.parse(element.dataset.plot),
}));

/** Return the points of a curve as [step, value] pairs, in order. */
function readCurve(plot, group) {
  const [left, right, top, bottom] = plot.box;
  const path = group.querySelector("path[d]")?.getAttribute("d") ?? "";
  const numbers = (path.match(/-?[\d.]+(?:e-?\d+)?/g) ?? []).map(Number);
  const scale = plot.log ? Math.log10 : (value) => value;
  const [low, high] = plot.y.map(scale);
  const points = [];
  for (let i = 0; i + 1 < numbers.length; i += 2) {
    const step = plot.x[0] + ((numbers[i] - left) / (right - left)) * (plot.x[1] - plot.x[0]);
    const value = low + ((bottom - numbers[i + 1]) / (bottom - top)) * (high - low);
    points.push([step, plot.log ? 10 ** value : value]);
  }
  return points;
}

function getCurves(plot) {
  plot.curves ??= [...plot.svg.querySelectorAll(".curve")].map((group) => ({
    group,
    ...plot.lines[Number(group.dataset.line)],
    points: readCurve(plot, group),
  }));
  return plot.curves;
}

/** Return the point whose step is nearest. */
function findNearest(points, step) {
  let low = 0;
  let high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(points[high][0] - step) < Math.abs(points[low][0] - step) ? points[high] : points[low];
}

function format(value) {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return size < 1e-12 ? "0" : value.toExponential(2);
  return String(Number(value.toPrecision(5)));
}

/** Draw the line at a step into a picture, and write down the values of its curves there. */
function show(plot, step) {
  const [left, right, top, bottom] = plot.box;
  const x = left + ((step - plot.x[0]) / (plot.x[1] - plot.x[0])) * (right - left);
  plot.cross ??= plot.svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "line"));
  const ends = { class: "cross", x1: x, x2: x, y1: top, y2: bottom };
  for (const [name, value] of Object.entries(ends)) plot.cross.setAttribute(name, value);
  const cells = [];
  for (const curve of getCurves(plot)) {
    if (!curve.points.length || getComputedStyle(curve.group).display === "none") continue;
    const [at, height] = findNearest(curve.points, step);
    // A run that had ended, or had not begun, has no value here; one of few points has it at another step.
    const spacing = (curve.points.at(-1)[0] - curve.points[0][0]) / Math.max(1, curve.points.length - 1);
    if (Math.abs(at - step) > Math.max(spacing, 0.5)) continue;
    const isElsewhere = Math.abs(at - step) > Math.max((plot.x[1] - plot.x[0]) / 200, 0.5);
    const value = document.createElement("span");
    value.className = "value";
    const swatch = document.createElement("span");
    swatch.className = `swatch swatch-${curve.run}`;
    const number = document.createElement("b");
    number.textContent = format(height);
    value.append(swatch, `${curve.label} `, number, isElsewhere ? ` (step ${Math.round(at).toLocaleString("en")})` : "");
    cells.push(value);
  }
  // With blanks between, for whoever copies the text.
  plot.readout.replaceChildren(`step ${Math.round(step).toLocaleString("en")}`, ...cells.flatMap((cell) => [" ", cell]));
}

function hide(plot) {
  plot.cross?.remove();
  delete plot.cross;
  plot.readout.replaceChildren();
}

function isVisible(plot) {
  return plot.element.offsetParent !== null;
}

for (const plot of plots) {
  plot.element.addEventListener("pointermove", (event) => {
    const [left, right] = plot.box;
    const frame = plot.svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * plot.svg.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (x - left) / (right - left)));
    const step = plot.x[0] + share * (plot.x[1] - plot.x[0]);
    for (const other of plots.filter(isVisible)) show(other, step);
  });
  plot.element.addEventListener("pointerleave", () => plots.forEach(hide));
}
