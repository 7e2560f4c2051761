// Panels of curves over the steps, each a chart of its own; their steps are zoomed together.
// Okabe and Ito's colours, which most colour-blind people tell apart; lighter ones on dark.
const THEMES = {
  light: {fg: "#1c2430", quiet: "#5b6675", grid: "#e4e8ee", bg: "#ffffff", blue: "#0072B2", raw: "rgba(0,114,178,.5)",
    red: "#D55E00", pale: "rgba(213,94,0,.5)", green: "#00855f", band: "rgba(0,158,115,.18)", orange: "#b87700",
    purple: "#a4487c", sky: "#2b87bd", gone: "rgba(213,94,0,.10)",
    stages: {DORMANT: "#b9c0ca", GERMINATED: "#b9c0ca", TRAINING: "#E69F00", BLENDING: "#56B4E9", FOSSILIZED: "#009E73", CULLED: "#CC79A7"}},
  dark: {fg: "#e6eaf0", quiet: "#a3adbb", grid: "#2a313b", bg: "#12161c", blue: "#56B4E9", raw: "rgba(86,180,233,.5)",
    red: "#ff8a4c", pale: "rgba(255,138,76,.55)", green: "#2fc49a", band: "rgba(47,196,154,.2)", orange: "#f0c04a",
    purple: "#e3a0c6", sky: "#8fd0f5", gone: "rgba(255,138,76,.13)",
    stages: {DORMANT: "#5b6675", GERMINATED: "#5b6675", TRAINING: "#c98b00", BLENDING: "#3f98cc", FOSSILIZED: "#0c8f6a", CULLED: "#b0648f"}},
};
const STAGES = {DORMANT: "host alone", TRAINING: "incubating"};
const stageName = (stage) => inert(STAGES[stage] || stage.toLowerCase());
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const ui = {theme: "light", log: true, raw: true, smooth: true, range: null, hidden: {}};
const graphs = new Map(); // id -> {element, draw, drawn}

function styleOf(role, c) {
  const line = (color, width, dash) => ({mode: "lines", line: {color, width, dash: dash || "solid"}});
  return {
    raw: line(c.raw, 1), undone: line(c.pale, 1), smooth: line(c.blue, 2.4),
    validation: {mode: "lines+markers", line: {color: c.fg, width: 1.2}, marker: {color: c.fg, size: 5}},
    test: {mode: "markers", marker: {color: c.red, size: 11, symbol: "diamond", line: {color: c.bg, width: 1}}},
    mean: line(c.green, 1.8), threshold1: line(c.orange, 1.5, "dash"), threshold2: line(c.purple, 1.5, "dot"),
    "evidence-drift": line(c.blue, 1.6), "evidence-shift": line(c.red, 1.6, "dash"), "evidence-collapse": line(c.purple, 1.6, "dot"),
    time: line(c.sky, 1.3), memory: line(c.blue, 1.8), memory2: line(c.orange, 1.8, "dash"), other: line(c.blue, 1.6),
  }[role] || line(c.blue, 1.6);
}

const OUTCOMES = {
  "rolled back": {symbol: "triangle-left", color: "red"}, "sat through": {symbol: "triangle-down-open", color: "orange"},
  unnoticed: {symbol: "x-thin-open", color: "purple"}, told: {symbol: "circle-open", color: "blue"},
};

function layoutOf(panel, c, height) {
  const narrow = window.innerWidth < 600;
  return {
    height, margin: {l: narrow ? 52 : 66, r: 14, t: 8, b: 34}, paper_bgcolor: c.bg, plot_bgcolor: c.bg,
    font: {color: c.fg, size: narrow ? 11 : 12, family: "system-ui, Liberation Sans, sans-serif"},
    hovermode: "x unified", hoverlabel: {bgcolor: c.bg, bordercolor: c.quiet, font: {color: c.fg}, align: "left", namelength: 40},
    showlegend: true, legend: {orientation: "h", x: 0, y: 1, yanchor: "bottom", font: {size: 11}, bgcolor: "rgba(0,0,0,0)", traceorder: "normal"},
    xaxis: {gridcolor: c.grid, linecolor: c.grid, zeroline: false, tickformat: ",d", nticks: narrow ? 5 : 10, hoverformat: ",d",
      unifiedhovertitle: {text: "step %{x:,d}"}, showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "dot", spikecolor: c.quiet},
    yaxis: {gridcolor: c.grid, linecolor: c.grid, zeroline: false, nticks: narrow ? 5 : 7, fixedrange: true,
      ticksuffix: {"%": "%", s: " s", B: "B"}[panel.unit] || "", tickformat: panel.unit === "B" ? "~s" : "", exponentformat: "power"},
    dragmode: "zoom", shapes: [], annotations: [],
  };
}

function tracesOf(panel, c, log) {
  const traces = [];
  for (const s of panel.series) {
    if ((s.role === "raw" || s.role === "undone") && !ui.raw) continue;
    if (s.role === "smooth" && !ui.smooth) continue;
    if (s.low) {
      const common = {x: s.x, mode: "lines", line: {width: 0, color: c.band}, hoverinfo: "skip", showlegend: false};
      traces.push({...common, y: s.low.map((v, at) => (log && v !== null && s.y[at] > 0 ? Math.max(v, s.y[at] / 10) : v))},
        {...common, y: s.high, fill: "tonexty", fillcolor: c.band, name: "one deviation", showlegend: true});
    }
    const unit = panel.unit === "%" ? "%" : panel.unit === "s" ? " s" : "";
    traces.push({type: "scatter", name: inert(s.name), x: s.x, y: s.y, connectgaps: false, ...styleOf(s.role, c),
      ...(s.shape ? {line: {...styleOf(s.role, c).line, shape: s.shape}} : {}),
      hovertemplate: panel.unit === "B" ? "%{y:.4s}B" : `%{y:.4g}${unit}`});
  }
  return traces;
}

function upper(panel, c, run, traces, layout) { // what stands at the top of a panel, whatever its scale
  const marks = [];
  if (panel.odd && panel.odd.length) {
    marks.push({type: "scatter", name: `not finite (${panel.odd_count})`, mode: "markers", x: panel.odd, y: panel.odd.map(() => 0.9),
      yaxis: "y2", marker: {symbol: "x", size: 8, color: c.red}, hovertemplate: "NaN or infinity"});
  }
  if (panel.incidents) {
    for (const [outcome, look] of Object.entries(OUTCOMES)) {
      const those = run.incidents.filter((each) => each.outcome === outcome).slice(0, 300);
      if (!those.length) continue;
      marks.push({type: "scatter", name: inert(outcome), mode: "markers", x: those.map((i) => i.end), y: those.map(() => 0.97), yaxis: "y2",
        marker: {symbol: look.symbol, size: 11, color: c[look.color], line: {width: 2, color: c[look.color]}},
        customdata: those.map((i) => i.id), text: those.map((i) => inert(i.title)), hovertemplate: "%{text}"});
    }
    for (const [low, high] of run.undone) {
      layout.shapes.push({type: "rect", xref: "x", yref: "paper", x0: low, x1: high, y0: 0, y1: 1, fillcolor: c.gone, line: {width: 0}, layer: "below"});
    }
  }
  if (!marks.length) return;
  layout.yaxis2 = {overlaying: "y", range: [0, 1], visible: false, fixedrange: true};
  traces.push(...marks);
}

function drawPanel(id, element, panel, run) {
  const c = THEMES[ui.theme];
  const log = Boolean(panel.log && ui.log);
  const height = panel.id === "loss" ? 360 : panel.id === "judge" ? 300 : 210;
  const layout = layoutOf(panel, c, height);
  const traces = tracesOf(panel, c, log);
  upper(panel, c, run, traces, layout);
  layout.yaxis.type = log ? "log" : "linear";
  for (const [name, at] of panel.lines || []) {
    layout.shapes.push({type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: at, y1: at, line: {color: c.quiet, width: 1, dash: "dash"}});
    layout.annotations.push({xref: "paper", yref: "y", x: 1, y: log ? Math.log10(at) : at, text: name, showarrow: false, xanchor: "right",
      yanchor: "bottom", font: {size: 10, color: c.quiet}});
  }
  place(id, element, traces, layout, panel, run, log);
}

function drawLane(id, element, run) {
  const c = THEMES[ui.theme];
  const layout = layoutOf({unit: ""}, c, 150);
  const traces = [];
  const seen = new Set();
  for (const [stage, first, last] of run.lane.stages) {
    traces.push({type: "scatter", mode: "lines", x: [first, last], y: [2, 2], line: {width: 14, color: c.stages[stage] || c.quiet},
      name: stageName(stage), legendgroup: inert(stage), showlegend: !seen.has(stage), text: stageName(stage),
      hovertemplate: `%{text}, steps ${first} to ${last}<extra></extra>`});
    seen.add(stage);
  }
  for (const [fate, symbol, name] of [["good", "circle", "known good"], ["discarded", "circle-open", "discarded"], ["pending", "diamond-open", "on probation"]]) {
    const kept = run.lane.captures[fate];
    if (!kept.x.length) continue;
    traces.push({type: "scatter", mode: "markers", x: kept.x, y: kept.x.map(() => 1), name: `capture ${name} (${kept.count})`, customdata: kept.id,
      marker: {symbol, color: c.green, size: kept.x.length > 200 ? 5 : 8}, hovertemplate: `capture %{customdata} of step %{x:,d}: ${name}<extra></extra>`});
  }
  for (const i of run.incidents.filter((each) => each.outcome === "rolled back").slice(0, 300)) {
    layout.annotations.push({x: i.first, y: 0, ax: i.end, ay: 0, xref: "x", yref: "y", axref: "x", ayref: "y", showarrow: true, arrowhead: 2,
      arrowwidth: 2, arrowcolor: c.red, text: ""});
  }
  for (const [outcome, look] of Object.entries(OUTCOMES)) {
    const those = run.incidents.filter((each) => each.outcome === outcome).slice(0, 2000);
    if (!those.length) continue;
    traces.push({type: "scatter", mode: "markers", x: those.map((i) => i.end), y: those.map(() => 0), name: inert(outcome), customdata: those.map((i) => i.id),
      marker: {symbol: look.symbol, size: 11, color: c[look.color], line: {width: 2, color: c[look.color]}}, text: those.map((i) => inert(i.title)), hovertemplate: "%{text}<extra></extra>"});
  }
  layout.hovermode = "closest";
  const rows = window.innerWidth < 600 ? ["inc.", "capt.", "seed"] : ["incidents", "captures", "seed"];
  Object.assign(layout.yaxis, {range: [-0.7, 2.7], tickvals: [0, 1, 2], ticktext: rows, showgrid: false, nticks: undefined});
  place(id, element, traces, layout, {series: []}, run, false);
}

function place(id, element, traces, layout, panel, run, log) {
  for (const trace of traces) if (ui.hidden[`${id}/${trace.name}`]) trace.visible = "legendonly";
  layout.xaxis.range = ui.range || [0, run.last * 1.005];
  layout.xaxis.autorange = false;
  const fitted = ui.range && panel.series.length ? fit(panel, ui.range, log) : null;
  if (fitted) layout.yaxis.range = fitted;
  const whole = log ? fit(panel, ui.range || [-Infinity, Infinity], log) : null;
  if (whole && whole[1] - whole[0] > 2 && whole[1] - whole[0] < 9) layout.yaxis.dtick = 1; // a label for each power
  const rows = legendRows(traces, element.clientWidth || 800);
  layout.margin.t = 10 + 19 * rows;
  layout.height += 19 * rows;
  const options = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "resetScale2d"],
    displayModeBar: window.innerWidth < 600 ? false : "hover",
    toImageButtonOptions: {filename: `tolaria-${id.replace(/[^a-z0-9-]/gi, "-")}`, scale: 2}};
  const isNew = !element.classList.contains("js-plotly-plot");
  Plotly.react(element, traces, layout, options);
  if (isNew) listen(id, element);
}

function legendRows(traces, width) { // one row, or columns as wide as the longest name
  const wide = traces.filter((trace) => trace.showlegend !== false).map((trace) => 42 + 6 * trace.name.length);
  const room = width - 84;
  if (wide.reduce((sum, each) => sum + each, 0) <= room) return 1;
  return Math.ceil(wide.length / Math.max(1, Math.floor(room / Math.max(...wide))));
}

function fit(panel, [from, to], log) { // the values between two steps, with some air
  let low = Infinity, high = -Infinity;
  for (const s of panel.series) {
    if ((s.role === "raw" || s.role === "undone") && !ui.raw) continue;
    for (let i = 0; i < s.x.length; i++) {
      const v = s.y[i];
      if (s.x[i] < from || s.x[i] > to || v === null || (log && v <= 0)) continue;
      low = Math.min(low, v); high = Math.max(high, v);
    }
  }
  if (low > high) return null;
  if (log) { low = Math.log10(low); high = Math.log10(high); }
  const air = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low - air, high + air];
}

function listen(id, element) {
  element.on("plotly_relayout", (change) => {
    if ("xaxis.range[0]" in change) setRange([Number(change["xaxis.range[0]"]), Number(change["xaxis.range[1]"])]);
    else if (change["xaxis.autorange"]) setRange(null);
  });
  element.on("plotly_doubleclick", () => { setRange(null); return false; });
  element.on("plotly_legendclick", (event) => {
    const key = `${id}/${event.data[event.curveNumber].name}`;
    ui.hidden[key] = !ui.hidden[key];
  });
  const incidentAt = (event) => {
    const point = event.points.find((each) => each.customdata !== undefined && OUTCOMES[each.data.name]);
    return point && current().incidents.find((each) => each.id === point.customdata);
  };
  element.on("plotly_hover", (event) => peek(incidentAt(event), element, event.event));
  element.on("plotly_unhover", () => peek(null));
  element.on("plotly_click", (event) => {
    const incident = incidentAt(event);
    if (incident) { peek(null); goTo(incident.id); }
  });
}

const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const graph = graphs.get(entry.target.id);
    if (!graph) continue;
    graph.seen = entry.isIntersecting;
    if (graph.seen && !graph.drawn) drawNow(graph);
  }
}, {rootMargin: "200px"});

function drawNow(graph) {
  graph.drawn = true;
  graph.draw();
}

function redraw() { // what is seen now, the rest when it is
  for (const graph of graphs.values()) {
    graph.drawn = false;
    if (graph.seen) drawNow(graph);
  }
}
