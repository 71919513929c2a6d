"use strict";
// Line charts as SVG: several runs in one picture, log scale, smoothing, the values under the mouse.

const COLOURS = ["#2b6cb0", "#d9730d", "#2f855a", "#c53030", "#6b46c1", "#0b7285", "#b83280", "#8a6d00",
  "#4a5568", "#00a37a"];

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

// A number in few characters: 0.00012 -> 1.2e-4, 123456 -> 123k.
function shortNumber(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace("e-", "e-").replace(".0e", "e");
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return String(+value.toPrecision(4));
}

// Round values between two ends, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step)
    found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const m of [1, 2, 5]) {
      const value = m * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  return found.length > 8 ? found.filter((v) => /^1e/.test(v.toExponential())) : found;
}

// Exponential moving average, corrected for its beginning. share: of what came before, 0 to 0.99.
function smoothed(values, share) {
  if (!share) return values;
  let mean = 0, weight = 0;
  return values.map((value) => {
    mean = share * mean + (1 - share) * value;
    weight = share * weight + (1 - share);
    return mean / weight;
  });
}

// series: [{name, colour, x: [...], y: [...]}], options: {title, log, smooth, xTitle}.
function drawChart(parent, series, options) {
  const box = document.createElement("div");
  box.className = "chart";
  const title = document.createElement("h4"), tip = document.createElement("div");
  title.textContent = options.title;
  tip.className = "tip";
  box.append(title);
  parent.append(box);
  const W = 560, H = 250, left = 52, right = 12, top = 8, bottom = 32;
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": options.title }, box);
  box.append(tip);

  const log = options.log && series.every((s) => s.y.every((v) => v > 0));
  const xs = series.flatMap((s) => s.x), ys = series.flatMap((s) => s.y);
  if (!xs.length) return;
  const least = (list) => list.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (list) => list.reduce((a, b) => Math.max(a, b), -Infinity);
  let x0 = least(xs), x1 = most(xs), y0 = least(ys), y1 = most(ys);
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  if (y0 === y1) { const pad = Math.abs(y0) * 0.1 || 1; y0 = log ? y0 * 0.9 : y0 - pad; y1 = log ? y1 * 1.1 : y1 + pad; }
  else if (!log) { const pad = (y1 - y0) * 0.05; y0 -= pad; y1 += pad; }
  const scaleY = log ? Math.log10 : (v) => v;
  const px = (x) => left + (x - x0) / (x1 - x0) * (W - left - right);
  const py = (y) => H - bottom - (scaleY(y) - scaleY(y0)) / (scaleY(y1) - scaleY(y0)) * (H - top - bottom);

  for (const value of log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    svg("line", { class: "grid", x1: left, x2: W - right, y1: py(value), y2: py(value) }, picture);
    svg("text", { x: left - 5, y: py(value) + 4, "text-anchor": "end" }, picture).textContent = shortNumber(value);
  }
  for (const value of ticks(x0, x1, 6)) {
    svg("text", { x: px(value), y: H - bottom + 14, "text-anchor": "middle" }, picture).textContent = shortNumber(value);
  }
  svg("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }, picture);
  svg("text", { x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle" }, picture).textContent = options.xTitle;

  const drawn = series.map((s) => ({ ...s, smooth: smoothed(s.y, options.smooth) }));
  const path = (x, y) => x.map((v, i) => `${i ? "L" : "M"}${px(v).toFixed(1)} ${py(y[i]).toFixed(1)}`).join("");
  for (const s of drawn) {
    if (options.smooth) svg("path", { class: "line faint", stroke: s.colour, d: path(s.x, s.y) }, picture);
    svg("path", { class: "line", stroke: s.colour, d: path(s.x, s.smooth), "data-run": s.name }, picture);
    if (s.x.length === 1) svg("circle", { r: 3, fill: s.colour, cx: px(s.x[0]), cy: py(s.y[0]) }, picture);
  }

  const cursor = svg("line", { class: "cursor", y1: top, y2: H - bottom, visibility: "hidden" }, picture);
  picture.addEventListener("mousemove", (event) => {
    const frame = picture.getBoundingClientRect();
    const at = x0 + ((event.clientX - frame.left) / frame.width * W - left) / (W - left - right) * (x1 - x0);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", px(Math.min(Math.max(at, x0), x1)));
    cursor.setAttribute("x2", px(Math.min(Math.max(at, x0), x1)));
    tip.replaceChildren(...drawn.filter((s) => s.x.length).map((s) => {
      let near = 0;
      s.x.forEach((v, i) => { if (Math.abs(v - at) < Math.abs(s.x[near] - at)) near = i; });
      const part = document.createElement("span"), key = document.createElement("span");
      key.className = "key";
      key.style.background = s.colour;
      part.append(key, `${shortNumber(s.x[near])}: ${shortNumber(s.y[near])}\u2003`);
      return part;
    }));
  });
  picture.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); tip.replaceChildren(); });
}
