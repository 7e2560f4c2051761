// The page: it fills itself from its data, once, or again whenever a watched run has gone on.
let data = JSON.parse(get("data").textContent);
let chosen = 0;
let version = 0;
let told = "";
const current = () => data.runs[chosen];

function panelBox(id, title, draw, note) {
  let box = get(`box-${id}`);
  if (!box) {
    box = make("div", null, "panel");
    box.id = `box-${id}`;
    const plot = make("div", null, "plot");
    plot.id = id;
    plot.tabIndex = 0;
    plot.setAttribute("role", "group");
    plot.addEventListener("keydown", onKey);
    box.append(make("h3"), plot, make("p", null, "quiet"));
    observer.observe(plot);
  }
  put(box.firstChild, title);
  box.querySelector(".plot").setAttribute("aria-label", `${title}, over the steps. Arrows move, plus and minus zoom, 0 shows all.`);
  box.lastChild.replaceChildren(sentence(note || ""));
  box.lastChild.hidden = !note;
  const known = graphs.get(id) || {};
  graphs.set(id, {...known, element: get(id) || box.querySelector(".plot"), draw});
  return box;
}

function fillPanels() {
  const run = current();
  const boxes = {first: [], rest: []};
  const keep = new Set();
  for (const panel of run.panels) {
    const id = `plot-${panel.id}`;
    keep.add(id);
    const box = panelBox(id, panel.title, () => drawPanel(id, graphs.get(id).element, panel, current()), panel.id === "judge" ? run.judge : "");
    boxes[panel.id === "loss" ? "first" : "rest"].push(box);
  }
  keep.add("plot-lane");
  const lane = panelBox("plot-lane", "Stages, captures, incidents", () => drawLane("plot-lane", graphs.get("plot-lane").element, current()));
  boxes.first.push(lane);
  const overlays = data.comparison ? overlayBoxes(keep) : [];
  for (const [id, graph] of graphs) if (!keep.has(id)) { Plotly.purge(graph.element); observer.unobserve(graph.element); graphs.delete(id); }
  arrange(get("first"), boxes.first);
  arrange(get("rest"), boxes.rest);
  arrange(get("overlays"), overlays);
}

function arrange(parent, boxes) { // without moving what is in place: that would blur the focus
  if (boxes.length === parent.children.length && boxes.every((box, at) => parent.children[at] === box)) return;
  parent.replaceChildren(...boxes);
}

function overlayBoxes(keep) { // the same panel of all runs in one
  const wanted = [["loss", "smooth"], ["curve-validation/val_accuracy", "validation"], ["curve-step/lr", "other"], ["seconds", "time"]];
  const found = [];
  for (const [panelId, role] of wanted) {
    const series = data.runs.flatMap((run, at) => {
      const panel = run.panels.find((each) => each.id === panelId);
      const curve = panel && panel.series.find((each) => each.role === role);
      return curve ? [{...curve, name: run.name, at}] : [];
    });
    const panel = data.runs.map((run) => run.panels.find((each) => each.id === panelId)).find(Boolean);
    if (series.length < 2) continue;
    const id = `plot-all-${panelId.replace(/[^a-z0-9-]/gi, "-")}`;
    keep.add(id);
    found.push(panelBox(id, `${panel.title}, all runs`, () => drawOverlay(id, panel, series)));
  }
  return found;
}

function drawOverlay(id, panel, series) {
  const c = THEMES[ui.theme], log = Boolean(panel.log && ui.log);
  const colors = [c.blue, c.red, c.green, c.purple, c.orange, c.sky, c.fg];
  const layout = layoutOf(panel, c, 280);
  layout.yaxis.type = log ? "log" : "linear";
  const traces = series.map((s) => ({type: "scatter", mode: "lines", name: inert(s.name).slice(0, 60), x: s.x, y: s.y,
    line: {color: colors[s.at % colors.length], width: 1.8, dash: DASHES[Math.floor(s.at / colors.length) % DASHES.length]}, hovertemplate: "%{y:.4g}"}));
  place(id, graphs.get(id).element, traces, layout, {series: series.map((s) => ({...s, role: "smooth"}))}, {last: Math.max(...data.runs.map((r) => r.last))}, log);
}

function setRange(range) {
  const last = current().last;
  if (range) {
    const [from, to] = [Math.max(-0.02 * last, Math.min(...range)), Math.min(1.02 * last, Math.max(...range))];
    range = to - from < 2 ? [from - 1, to + 1] : [from, to];
    if (range[1] - range[0] >= last) range = null;
  }
  if (JSON.stringify(range) === JSON.stringify(ui.range)) return;
  ui.range = range;
  const of = (step) => Math.max(0, Math.round(step)).toLocaleString("en");
  put(get("range"), range ? `Steps ${of(range[0])} to ${of(range[1])}` : "Drag over steps to zoom; double click for the whole run. Tab into a chart for the keyboard: arrows, +, -, 0.");
  redraw();
}

function zoom(what) {
  const [from, to] = ui.range || [0, current().last];
  const width = to - from, middle = (from + to) / 2;
  if (what === "all") setRange(null);
  else if (what === "in") setRange([middle - width / 4, middle + width / 4]);
  else if (what === "out") setRange([middle - width, middle + width]);
  else {
    const move = Math.min(Math.max((what === "left" ? -1 : 1) * width / 4, -from), current().last - to);
    setRange([from + move, to + move]);
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const what = {ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "all", Home: "all"}[event.key];
  if (!what) return;
  event.preventDefault();
  zoom(what);
}

function showIncident(incident) {
  const around = Math.max(30, 2 * (incident.end - incident.first));
  setRange([incident.first - around / 2, incident.end + around]);
  get("first").scrollIntoView({block: "start"});
}

function goTo(id) {
  get("outcome").value = "";
  get("find").value = "";
  fillIncidents(current());
  const row = get(`incident-${id}`);
  if (!row) return;
  location.hash = row.id;
  for (const each of document.querySelectorAll(".here")) each.classList.remove("here");
  row.classList.add("here");
  row.focus({preventScroll: true});
}

function csv() {
  const cell = (text) => `"${String(text).replace(/"/g, '""').replace(/^[=+\-@\t\r]/, "'$&")}"`;
  const lines = ["panel,series,step,value"];
  for (const panel of current().panels) {
    for (const s of panel.series) s.x.forEach((step, at) => lines.push(`${cell(panel.title)},${cell(s.name)},${step},${s.y[at] === null ? "" : s.y[at]}`));
    for (const step of panel.odd || []) lines.push(`${cell(panel.title)},"not finite",${step},`);
  }
  download("tolaria-points.csv", lines.join("\n") + "\n", "text/csv");
}

function setTheme(theme) {
  ui.theme = theme;
  document.documentElement.dataset.theme = theme;
  get("theme").setAttribute("aria-pressed", String(theme === "dark"));
  redraw();
}

function fillAll() {
  const run = current();
  const title = run.name + (run.task && run.task !== run.name ? ` (${run.task})` : "");
  put(get("name"), data.comparison ? `${data.runs.length} runs` : title);
  put(get("which-run"), title).hidden = !data.comparison;
  put(get("verdict"), run.verdict).className = run.kind;
  fillTiles(run);
  const now = JSON.stringify([chosen, run.incidents]);
  if (now !== told) { // else what is open would be closed, and the focus lost
    told = now;
    fillOutcomes(run);
    fillIncidents(run);
  }
  fillSettings(run);
  fillComparison(data.comparison);
  fillPanels();
  put(get("foot"), `tolaria ${data.version}. Curves keep the least and the largest value of each stretch of steps.`);
}

function start() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  get("which").hidden = data.runs.length < 2;
  get("run").replaceChildren(...data.runs.map((run, at) => new Option(shorten(run.name)[0], at)));
  get("run").addEventListener("change", (event) => { chosen = Number(event.target.value); ui.range = null; fillAll(); redraw(); });
  get("theme").addEventListener("click", () => setTheme(ui.theme === "dark" ? "light" : "dark"));
  get("outcome").addEventListener("change", () => fillIncidents(current()));
  get("find").addEventListener("input", () => fillIncidents(current()));
  get("tools").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const what = button.dataset.do;
    if (what === "csv") csv();
    else if (what in ui) { ui[what] = !ui[what]; button.setAttribute("aria-pressed", String(ui[what])); redraw(); }
    else zoom(what);
  });
  ui.range = undefined;
  setTheme(dark.matches ? "dark" : "light");
  fillAll();
  setRange(null);
  window.addEventListener("beforeprint", () => {
    ui.before = ui.theme;
    setTheme("light");
    for (const graph of graphs.values()) { drawNow(graph); Plotly.relayout(graph.element, {width: 680}); }
  });
  window.addEventListener("afterprint", () => {
    setTheme(ui.before);
    for (const graph of graphs.values()) if (graph.drawn) Plotly.Plots.resize(graph.element);
  });
  if (data.live) { get("live").hidden = false; poll(); }
  if (location.hash.startsWith("#incident-")) goTo(location.hash.slice(10));
}

async function poll() {
  const live = get("live");
  try {
    const answer = await fetch(`data.json?after=${version}`, {cache: "no-store"});
    if (answer.status === 200) {
      const next = await answer.json();
      version = next.data_version;
      data = next;
      fillAll();
      redraw();
    }
    put(live, answer.ok ? "watching" : "the watch has ended").classList.toggle("lost", !answer.ok);
  } catch {
    put(live, "the watch has ended").classList.add("lost");
  }
  setTimeout(poll, 1000);
}

start();
