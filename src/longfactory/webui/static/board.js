"use strict";
// Runs side by side: a table, curves, keys in which they differ, what verify has found. The page and
// the exported file draw with the same functions.

const TITLES = { loss: "Loss", eval_loss: "Evaluation loss", reward: "Reward", accuracy: "Accuracy",
  eval_accuracy: "Evaluation accuracy", lr: "Learning rate", grad_norm: "Gradient norm",
  throughput: "Tokens/s since the start",
  tokens_per_second_per_gpu: "Tokens/s of one GPU", mfu: "MFU", peak_memory_gib: "Peak memory, GiB",
  data_wait: "Share of time spent waiting for data", padding: "Padding, share of the tokens",
  packing: "Packing: share of each row that is filled", seconds_per_step: "Seconds of a step", vram_allocated: "Memory allocated, GiB", vram_reserved: "Memory reserved, GiB" };
const ORDER = ["loss", "eval_loss", "reward", "accuracy", "eval_accuracy", "grad_norm", "lr", "tokens_per_second_per_gpu", "throughput",
  "peak_memory_gib", "mfu"];
const AXES = [["steps", 0], ["seconds", 2], ["tokens", 3]];

function make(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties || {});
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function colourKey(colour) {
  const key = make("span", { className: "key" });
  key.style.background = colour;
  return key;
}

// Rewards stand beside the loss, memory at the end; what is not known comes by its name.
function metricOrder(name) {
  const known = ORDER.indexOf(name);
  if (known >= 0) return known;
  if (name.startsWith("reward")) return 2.5;
  return /gib|vram|memory/i.test(name) ? 200 : 100;
}

function last(curve) { return curve ? curve[1][curve[1].length - 1] : undefined; }
function lowest(curve) { return curve ? curve[1].reduce((a, b) => Math.min(a, b), Infinity) : undefined; }

function runTable(runs, colours) {
  const memory = (run) => Object.keys(run.curves).filter((name) => /gib|vram|memory/i.test(name)).sort()[0];
  const columns = [["step", (r) => r.step === null || r.step === undefined ? "" : `${r.step} / ${r.steps ?? "?"}`],
    ["loss", (r) => shortNumber(last(r.curves.loss))], ["lowest loss", (r) => shortNumber(lowest(r.curves.loss))],
    ["eval loss", (r) => shortNumber(last(r.curves.eval_loss))], ["reward", (r) => shortNumber(last(r.curves.reward))],
    ["accuracy", (r) => shortNumber(last(r.curves.accuracy))], ["grad norm", (r) => shortNumber(last(r.curves.grad_norm))],
    ["lr", (r) => shortNumber(last(r.curves.lr))],
    ["tokens/s per GPU", (r) => shortNumber(last(r.curves.tokens_per_second_per_gpu ?? r.curves.throughput))],
    ["memory, GiB", (r) => shortNumber(last(r.curves[memory(r)]))]];
  const shown = columns.filter(([, value]) => runs.some((run) => value(run) !== ""));
  const table = make("table", { className: "summary" });
  table.append(make("tr", {}, make("th", { textContent: "run" }),
    ...shown.map(([name]) => make("th", { textContent: name })), make("th", { textContent: "verify" }),
    make("th", { textContent: "notes" })));
  runs.forEach((run, i) => {
    const notes = [];
    if (run.gone) notes.push("its log is not there any more; what was read of it stays");
    if (run.malformed) notes.push(`${run.malformed} lines of its log cannot be read`);
    const verdict = run.verify === null ? "" : run.verify.exact ? "the same" : "NOT the same";
    table.append(make("tr", {}, make("td", {}, colourKey(colours[i]), run.name),
      ...shown.map(([, value]) => make("td", { className: "n", textContent: value(run) })),
      make("td", { textContent: verdict, className: run.verify && !run.verify.exact ? "problem" : "good" }),
      make("td", { textContent: notes.join("; "), className: "warning" })));
  });
  return table;
}

function differenceTable(runs, colours, differences) {
  const table = make("table", { className: "differences" });
  table.append(make("tr", {}, make("th", { textContent: "key" }),
    ...runs.map((run, i) => make("th", {}, colourKey(colours[i]), run.name))));
  for (const { key, values } of differences)
    table.append(make("tr", {}, make("td", { textContent: key }),
      ...values.map((v) => make("td", { textContent: v === null ? "" : typeof v === "string" ? v : JSON.stringify(v) }))));
  return table;
}

function verifyReport(run, colour) {
  const report = run.verify, box = make("div", { className: "sample" });
  box.append(make("p", {}, colourKey(colour), `${run.name}: `,
    make("strong", { className: report.exact ? "good" : "problem", textContent: report.exact ? "the same" : "NOT the same" }),
    ` ${report.title}`));
  const table = make("table", {}, make("tr", {}, ...["", "split", "alone", "difference", "allowed"]
    .map((name) => make("th", { textContent: name }))));
  for (const name of ["loss", "grad_norm", "logps"]) {
    const found = report[name];
    table.append(make("tr", {}, make("td", { textContent: name }), ...["split", "alone", "difference", "allowed"]
      .map((part) => make("td", { className: "n", textContent: shortNumber(found[part]) }))));
  }
  box.append(table, make("p", { className: "pale", textContent: `${report.parameters} parameters` }));
  for (const reason of report.reasons) box.append(make("p", { className: "problem", textContent: reason }));
  if (report.conclusion) box.append(make("p", { textContent: report.conclusion }));
  for (const check of report.checks)
    box.append(make("div", { className: check.state === "failed" ? "problem" : "pale",
      textContent: `${check.state}: ${check.name}: ${check.words}` }));
  return box;
}

// What the viewer has set stays while the data change.
const boardSettings = { axis: 0, log: false, smooth: 0 };

function drawBoard(parent, data) {
  const runs = data.runs, colours = runs.map((_, i) => COLOURS[i % COLOURS.length]);
  parent.replaceChildren();
  if (!runs.length) {
    parent.append(make("p", { className: "pale", textContent: "No run is selected." }));
    return;
  }
  const again = () => drawBoard(parent, data);
  const axis = make("select", { ariaLabel: "horizontal axis", onchange: () => { boardSettings.axis = +axis.value; again(); } },
    ...AXES.map(([name], i) => make("option", { value: i, textContent: name, selected: i === boardSettings.axis })));
  const log = make("input", { type: "checkbox", checked: boardSettings.log, onchange: () => { boardSettings.log = log.checked; again(); } });
  const smooth = make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: boardSettings.smooth, ariaLabel: "smoothing",
    onchange: () => { boardSettings.smooth = +smooth.value; again(); } });
  parent.append(runTable(runs, colours), make("div", { className: "bar" }, make("label", {}, "over ", axis),
    make("label", {}, log, " log scale"), make("label", {}, "smoothing ", smooth)));
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))]
    .sort((a, b) => metricOrder(a) - metricOrder(b) || a.localeCompare(b));
  const charts = make("div", { className: "charts" }), [xTitle, column] = AXES[boardSettings.axis];
  for (const name of names) {
    const series = [];
    runs.forEach((run, i) => {
      const curve = run.curves[name];
      if (!curve) return;
      const kept = curve[0].map((_, k) => k).filter((k) => curve[column][k] >= 0);
      if (kept.length) series.push({ name: run.name, colour: colours[i], x: kept.map((k) => curve[column][k]), y: kept.map((k) => curve[1][k]) });
    });
    if (series.length) drawChart(charts, series, { title: TITLES[name] || name, log: boardSettings.log, smooth: boardSettings.smooth, xTitle });
  }
  parent.append(charts);
  if (runs.length > 1) {
    parent.append(make("h3", { textContent: "Keys that differ" }));
    parent.append(data.differences.length ? differenceTable(runs, colours, data.differences)
      : make("p", { className: "pale", textContent: "None in their longfactory.yaml." }));
  }
  const verified = runs.map((run, i) => run.verify && verifyReport(run, colours[i])).filter(Boolean);
  if (verified.length) parent.append(make("h3", { textContent: "longfactory verify" }), ...verified);
}
