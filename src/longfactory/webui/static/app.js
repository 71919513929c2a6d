"use strict";
// The page: what is shown here is asked from the server again and again; nothing is kept but what is
// being typed. Texts of runs, logs and models are only ever set as text, never as HTML.

const by = (id) => document.getElementById(id);
let about = null;

// -- asking ------------------------------------------------------------------------------------------

async function api(path, sent, signal) {
  const options = sent === undefined ? { signal }
    : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(sent), signal };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    by("connection").textContent = "The server does not answer.";
    throw new Error("The server does not answer. Is `longfactory webui` still running?");
  }
  by("connection").textContent = "";
  if (answer.status === 204) return null;
  const type = answer.headers.get("content-type") || "";
  const found = type.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(found.error || `The server answered with status ${answer.status}.`);
  return found;
}

// Calls `work` while its tab is shown and the page is seen; one call at a time.
function repeat(tab, seconds, work) {
  const turn = async () => {
    if (!document.hidden && by(tab).classList.contains("here")) {
      try { await work(); } catch (error) { /* told by `api`; the next turn asks again */ }
    }
    setTimeout(turn, seconds * 1000);
  };
  turn();
}

function later(milliseconds, work) {
  let timer = null;
  return () => { clearTimeout(timer); timer = setTimeout(work, milliseconds); };
}

function showTab(name) {
  for (const button of document.querySelectorAll("nav button")) button.classList.toggle("here", button.dataset.tab === name);
  for (const tab of document.querySelectorAll(".tab")) tab.classList.toggle("here", tab.id === name);
  if (name === "runs") showJobs();
  if (name === "compare") showRuns();
  if (name === "models") showModels();
}
for (const button of document.querySelectorAll("nav button")) button.onclick = () => showTab(button.dataset.tab);

// -- composing ---------------------------------------------------------------------------------------

// A value as YAML on one line. What would be read as another type is put in quotes.
function yamlValue(text) {
  if (/^(true|false|null|~|-?\d[\d_]*(\.\d*)?([eE][-+]?\d+)?)$/i.test(text)) return text;
  return /^[A-Za-z0-9_.\/~][\w.\/,~ -]*$/.test(text) && !text.endsWith(" ") ? text : JSON.stringify(text);
}

// The YAML with one key set, its comment and all other lines kept; an empty value takes the key out,
// or leaves its line while its field is being typed in.
function withKey(yaml, key, text, typing) {
  const lines = yaml.split("\n");
  const at = lines.findIndex((line) => line.startsWith(`${key}:`));
  const fresh = text !== "" ? [`${key}: ${yamlValue(text)}`] : typing && at >= 0 ? [`${key}:`] : [];
  if (at < 0) {
    while (lines.length && lines[lines.length - 1].trim() === "") lines.pop();
    return [...lines, ...fresh, ""].join("\n");
  }
  let end = at + 1;  // what belongs to the value: deeper lines and list items
  while (end < lines.length && /^(\s+\S|- |-$)/.test(lines[end])) end += 1;
  const comment = end === at + 1 && /\s#\s.*$/.exec(lines[at]);
  if (comment && fresh.length) fresh[0] = `${fresh[0]}  ${comment[0].trim()}`;
  lines.splice(at, end - at, ...fresh);
  return lines.join("\n");
}

function field(key) {
  const name = make("span", { className: "name", textContent: key.name });
  const shown = key.default === null || (Array.isArray(key.default) && !key.default.length) ? "" : String(key.default);
  let input;
  if (key.choices.length) {
    input = make("select", {}, make("option", { value: "", textContent: shown ? `(${shown})` : "" }),
      ...key.choices.map((choice) => make("option", { value: choice, textContent: choice })));
  } else {
    input = make("input", { placeholder: shown, autocomplete: "off", type: key.secret ? "password" : "text" });
    if (key.name === "template") input.setAttribute("list", "templates");
    if (key.name === "dataset" || key.name === "eval_dataset") input.setAttribute("list", "data-sets");
  }
  input.dataset.key = key.name;
  const set = (typing) => { by("yaml").value = withKey(by("yaml").value, key.name, input.value.trim(), typing); yamlChanged(); };
  input.oninput = () => set(input.tagName === "INPUT");
  input.onchange = () => { if (input.value.trim() === "") set(false); };
  return make("label", { className: "field", title: `${key.help} [${key.kind}]` }, name, input);
}

function showFields() {
  by("fields").replaceChildren(...about.keys.filter((key) => key.form).map(field),
    make("datalist", { id: "templates" }, ...about.templates.map((name) => make("option", { value: name }))),
    make("datalist", { id: "data-sets" }));
}

by("search").oninput = () => {
  const word = by("search").value.trim().toLowerCase();
  const found = word.length < 2 ? [] : about.keys.filter((key) => `${key.name} ${key.help}`.toLowerCase().includes(word));
  by("found").replaceChildren(...found.slice(0, 12).map((key) =>
    make("div", { className: "found" }, field(key), make("p", { className: "pale", textContent: `${key.help} [${key.kind}]` }))));
  fillFields(lastValues);
};

let lastValues = {};
function fillFields(values) {
  lastValues = values;
  for (const input of document.querySelectorAll("[data-key]")) {
    const value = values[input.dataset.key];
    input.closest(".field").classList.toggle("set", value !== undefined);
    if (input === document.activeElement) continue;
    const text = value === undefined || value === null ? "" : Array.isArray(value) ? value.join(", ")
      : typeof value === "object" ? JSON.stringify(value) : String(value);
    input.value = text;
    if (input.tagName === "SELECT" && input.value !== text) input.value = "";
  }
}

let checking = 0, checkedFine = false;
const asking = {};  // what is being asked: its AbortController

async function checkRun() {
  const turn = ++checking, yaml = by("yaml").value;
  if (!yaml.trim()) { showVerdict({ problems: [], warnings: [], notes: [], arithmetic: [], values: {} }, false); return; }
  try {
    const found = await api("/api/check", { yaml, command: "train" });
    if (turn !== checking) return;
    showVerdict(found, !found.problems.length);
  } catch (error) {
    if (turn === checking) showVerdict({ problems: [error.message], warnings: [], notes: [], arithmetic: [], values: {} }, false);
  }
}

let knownFolder = null;
function showVerdict(found, fine) {
  checkedFine = fine;
  const said = (texts, name) => texts.map((text) => make("p", { className: name, textContent: text }));
  by("verdict").replaceChildren(...said(found.problems, "problem"), ...said(found.warnings, "warning"),
    ...said(found.notes, "pale"), ...said(found.arithmetic, "pale"));
  for (const id of ["start", "verify", "show-data"]) by(id).disabled = !fine;
  fillFields(found.values);
  const folder = found.values.dataset_dir || "data";
  if (folder !== knownFolder) {
    knownFolder = folder;
    api(`/api/data_sets?folder=${encodeURIComponent(folder)}`).catch(() => ({ data_sets: [] })).then((answer) =>
      by("data-sets").replaceChildren(...answer.data_sets.map((name) => make("option", { value: name }))));
  }
  if (fine) askSoon();
}

// Asks a process of its own; a question that has changed meanwhile is given up.
async function askProcess(what, place, state, more) {
  if (asking[what]) asking[what].abort();
  const mine = asking[what] = new AbortController();
  by(state).textContent = "asking ...";
  by(place).classList.add("old");
  try {
    const answer = await api(`/api/${what}`, { yaml: by("yaml").value, ...more }, mine.signal);
    if (asking[what] !== mine || answer === null) return;
    by(state).textContent = "";
    by(place).classList.remove("old");
    return answer;
  } catch (error) {
    if (error.name === "AbortError" || asking[what] !== mine) return;
    by(state).textContent = "";
    by(place).classList.remove("old");
    return { status: 1, output: "", error: error.message };
  }
}

function showAnswer(place, answer) {
  if (!answer) return;
  const notes = answer.error.trim();
  by(place).replaceChildren(make("span", { className: answer.status === 2 || answer.status === null ? "problem" : "warning",
    textContent: notes ? `${notes}\n\n` : "" }), answer.output.trim());
}

async function askDry() { showAnswer("dry", await askProcess("dry_run", "dry", "dry-state")); }
async function askPlan() {
  showAnswer("plan", await askProcess("plan", "plan", "plan-state", { gpus: +by("gpus").value, gpu: by("gpu").value }));
}
for (const id of ["gpus", "gpu"]) by(id).onchange = () => { if (checkedFine) askPlan(); };

const checkSoon = later(250, checkRun);
const askSoon = later(700, () => { if (checkedFine) { askDry(); askPlan(); } });  // each starts a process
function yamlChanged() {
  checkedFine = false;
  for (const id of ["start", "verify", "show-data"]) by(id).disabled = true;
  by("started").textContent = "";
  for (const place of ["dry", "plan"]) by(place).classList.add("old");
  sessionStorage.setItem("yaml", by("yaml").value);
  checkSoon();
}
by("yaml").oninput = yamlChanged;

by("recipe").onchange = async () => {
  const path = by("recipe").value;
  if (!path) return;
  try {
    by("yaml").value = (await api(`/api/recipe?path=${encodeURIComponent(path)}`)).yaml;
  } catch (error) { by("started").textContent = error.message; return; }
  yamlChanged();
};

by("download").onclick = () => save(new Blob([by("yaml").value], { type: "text/yaml" }), "run.yaml");
function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function startJob(command, yaml, said, more = {}) {
  try {
    const job = await api("/api/jobs", { command, yaml, ...more });
    said.textContent = "";
    chosenJob = job.name;
    showTab("runs");
  } catch (error) { said.textContent = error.message; }
}
by("start").onclick = () => startJob("train", by("yaml").value, by("started"));
by("verify").onclick = () => startJob("verify", by("yaml").value, by("started"));

by("show-data").onclick = async () => {
  by("data").hidden = false;
  const answer = await askProcess("preview", "samples", "data-state");
  if (!answer) return;
  if (answer.status !== 0) {
    by("samples").replaceChildren(make("p", { className: "problem", textContent: answer.error.trim() || "The process ended without an answer." }));
    return;
  }
  const found = JSON.parse(answer.output);
  by("samples").replaceChildren(make("p", { className: "pale", textContent: found.report }), ...found.samples.map((sample) =>
    make("div", { className: "sample" },
      make("strong", { textContent: `Sample ${sample.number} (${sample.which}): ${sample.trained} of ${sample.tokens} tokens are trained` }),
      ...sample.documents.map((document, i) => make("pre", {},
        sample.documents.length > 1 ? make("span", { className: "pale", textContent: `${i + 1} ${document.role}\n` }) : null,
        ...document.parts.map((part) => make("span", { textContent: part.text,
          className: part.trained === null ? "cut" : part.trained ? "trained" : "" })))))));
  for (const text of by("samples").querySelectorAll("pre")) {  // what is trained often stands at the end
    const first = text.querySelector(".trained");
    if (first) text.scrollTop = first.offsetTop - text.offsetTop - text.clientHeight / 2;
  }
};

// -- runs --------------------------------------------------------------------------------------------

let chosenJob = null;
const STATES = { running: "good", stopping: "warning", done: "good", stopped: "warning", failed: "problem", unknown: "problem" };
const MEANING = { stopped: "stopped, saved: the same run goes on from there", unknown: "ended while this server did not run: its console says how" };

// A path from the chosen folder on, as the board names its runs.
function shortPath(path) {
  const root = about.folders.find((folder) => path.startsWith(`${folder}/`));
  return root ? path.slice(root.length + 1) : path;
}

function progressOf(job) {
  const row = job.last || {};
  if (!row.total_steps || row.current_steps === undefined) return "";
  const parts = [`step ${row.current_steps} of ${row.total_steps}`];
  if (row.loss !== undefined) parts.push(`loss ${shortNumber(row.loss)}`);
  const rate = row.tokens_per_second_per_gpu ?? row.throughput;
  if (rate !== undefined) parts.push(`${shortNumber(rate)} tokens/s per GPU`);
  return parts.join(", ");
}

async function showJobs() {
  const { jobs } = await api("/api/jobs");
  if (chosenJob === null && jobs.length) chosenJob = jobs[0].name;
  by("jobs").replaceChildren(...jobs.map((job) => {
    const button = make("button", { className: `job${job.name === chosenJob ? " here" : ""}`, onclick: () => { chosenJob = job.name; showJobs(); } },
      make("strong", { textContent: `${job.command} ` }), make("span", { className: STATES[job.state], textContent: job.state }),
      make("div", { className: "where", textContent: shortPath(job.output_dir) || job.name }),
      make("div", { className: "pale", textContent: [new Date(job.started * 1000).toLocaleString(), progressOf(job)].filter(Boolean).join(" \u00b7 ") }));
    if (job.last && job.last.total_steps)
      button.append(make("progress", { max: job.last.total_steps, value: job.last.current_steps }));
    return button;
  }));
  if (!jobs.length) by("jobs").replaceChildren(make("p", { className: "pale", textContent: "Nothing has been started yet." }));
  if (chosenJob !== null) await showJob();
}

let shownJob = "";
async function showJob() {
  const job = await api(`/api/jobs/${encodeURIComponent(chosenJob)}`);
  const box = by("job");
  if (shownJob !== job.name) {
    shownJob = job.name;
    box.replaceChildren(make("div", { className: "bar", id: "job-bar" }), make("div", { id: "job-verify" }), make("div", { id: "job-picture" }),
      make("pre", { id: "console" }), make("details", {}, make("summary", { textContent: "YAML" }), make("pre", { id: "job-yaml" })));
  }
  const bar = by("job-bar"), runs = job.ended === null;
  const status = job.status !== null && job.status !== 0 ? ` (exit status ${job.status})` : "";
  const state = make("strong", { className: STATES[job.state], textContent: (MEANING[job.state] || job.state) + status });
  const buttons = [];
  const stopWith = (kill) => async () => { await api(`/api/jobs/${job.name}/stop`, { kill }); showJobs(); };
  if (runs && job.asked === null) buttons.push(make("button", { className: "danger", id: "stop", textContent: "Stop", title: "saves, then ends", onclick: stopWith(false) }));
  if (runs && job.asked !== null) buttons.push(make("button", { className: "danger", textContent: "End it now, without saving", onclick: stopWith(true) }));
  buttons.push(make("button", { className: "small", textContent: "Compose from it", onclick: () => { by("yaml").value = job.yaml; yamlChanged(); showTab("compose"); } }));
  bar.replaceChildren(make("span", { textContent: job.command }), state, make("span", { className: "pale", textContent: progressOf(job) }), ...buttons);
  if (job.picture && !by("job-picture").firstChild)
    by("job-picture").append(make("img", { src: `/api/jobs/${job.name}/picture`, alt: "what the model finds, by length and depth", className: "picture" }));
  by("job-verify").replaceChildren(...(job.verify ? [verifyReport({ name: job.output_dir, verify: job.verify }, "#888")] : []));
  const text = by("console"), atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 30;
  if (text.textContent !== job.console) {
    text.textContent = job.console;
    if (atEnd) text.scrollTop = text.scrollHeight;
  }
  by("job-yaml").textContent = job.yaml;
}
repeat("runs", 1.5, showJobs);

// -- the board ---------------------------------------------------------------------------------------

const chosenRuns = new Set(), seenRuns = new Set(), kept = {};
let firstLook = true, drawn = "";

async function showRuns() {
  const { runs } = await api("/api/runs");
  runs.forEach((run, i) => {  // the last four, and what begins while the page is open
    if (!seenRuns.has(run.folder) && (firstLook ? i < 4 : chosenRuns.size < 10)) chosenRuns.add(run.folder);
    seenRuns.add(run.folder);
  });
  firstLook = firstLook && !runs.length;
  const shown = [...by("choices").querySelectorAll("input")].map((input) => input.value);
  if (JSON.stringify(shown) !== JSON.stringify(runs.map((run) => run.folder)))
    by("choices").replaceChildren(make("div", { className: "choices" }, ...runs.map((run) => {
      const input = make("input", { type: "checkbox", value: run.folder, checked: chosenRuns.has(run.folder) });
      input.onchange = () => { if (input.checked) chosenRuns.add(run.folder); else chosenRuns.delete(run.folder); showBoard(); };
      return make("label", {}, input, ` ${run.name}`);
    })));
  if (!runs.length) by("choices").replaceChildren(make("p", { className: "pale", textContent: "No folder holds a trainer_log.jsonl." }));
  await showBoard();
}

async function showBoard() {
  const folders = [...chosenRuns];
  const known = Object.fromEntries(folders.filter((f) => kept[f]).map((f) => [f, kept[f].version]));
  const data = await api("/api/compare", { folders, known });
  for (const run of data.runs) {
    if (run.curves === null) run.curves = kept[run.folder].curves;
    kept[run.folder] = { version: run.version, curves: run.curves };
  }
  const state = JSON.stringify([data.runs.map((run) => [run.folder, run.version, run.verify, run.keys])]);
  if (state !== drawn) { drawn = state; drawBoard(by("board"), data); }
}
repeat("compare", 2, showRuns);

by("export-board").onclick = async () => {
  const answer = await fetch("/api/export_board", { method: "POST", headers: { "content-type": "application/json" },
    body: JSON.stringify({ folders: [...chosenRuns] }) });
  if (answer.ok) save(await answer.blob(), "longfactory-board.html");
};

// -- chat and export ---------------------------------------------------------------------------------

async function showModels() {
  const { models } = await api("/api/models");
  const before = by("model").value;
  by("model").replaceChildren(make("option", { value: "", textContent: models.length ? "choose ..." : "none in the folders" }),
    ...models.map((model) => make("option", { value: model.folder, textContent: `${model.name} (${model.kind})`, selected: model.folder === before })));
}
by("model").onchange = async () => {
  if (by("model").value)
    by("model-yaml").value = (await api(`/api/model_run?folder=${encodeURIComponent(by("model").value)}`)).yaml;
};

async function chatDo(sent) {
  by("model-said").textContent = "";
  try { showMessages(await api("/api/chat", sent)); } catch (error) { by("model-said").textContent = error.message; }
}
by("load").onclick = () => chatDo({ do: "load", yaml: by("model-yaml").value });
by("clear").onclick = () => chatDo({ do: "clear" });
by("unload").onclick = () => chatDo({ do: "close" });
by("export").onclick = () => startJob("export", by("model-yaml").value, by("model-said"));
by("measure").onclick = () => startJob("eval", by("model-yaml").value, by("model-said"), { lengths: by("lengths").value, samples: by("texts").value });
by("expand").onclick = () => startJob("expand", by("model-yaml").value, by("model-said"), { layers: by("layers").value });
by("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = by("message").value.trim();
  if (text) { by("message").value = ""; chatDo({ do: "ask", text }); }
};

let shownChat = -1;
function showMessages(chat) {
  if (chat.version === shownChat) return;
  shownChat = chat.version;
  const said = { none: "No model is loaded.", loading: `Loading ${chat.model} ...`, ready: chat.model, answering: `${chat.model} answers ...`,
    ended: `${chat.model}: ended.` };
  by("chat-state").textContent = said[chat.state];
  by("messages").replaceChildren(...chat.messages.map((message) => make("div", { className: `message ${message.role}`, textContent: message.text })),
    ...(chat.error ? [make("p", { className: "problem", textContent: chat.error })] : []));
  by("messages").scrollTop = by("messages").scrollHeight;
}
repeat("models", 0.7, async () => showMessages(await api("/api/chat")));

// -- the beginning -----------------------------------------------------------------------------------

(async () => {
  about = await api("/api/about");
  showFields();
  by("gpus").replaceChildren(...[1, 2, 4, 8, 16, 32, 64].map((n) => make("option", { value: n, textContent: n, selected: n === 8 })));
  by("gpu").replaceChildren(...about.gpus.map((name) => make("option", { value: name, textContent: name })));
  const { recipes } = await api("/api/recipes");
  by("recipe").append(...recipes.map((recipe) => make("option", { value: recipe.path, textContent: recipe.name })));
  by("yaml").value = sessionStorage.getItem("yaml") || "";
  if (by("yaml").value) yamlChanged();
})();
