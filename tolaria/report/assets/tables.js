// Tables and cards: everything that is read, not drawn.
function fillTable(table, head, rows) {
  table.replaceChildren();
  if (head) {
    const line = table.createTHead().insertRow();
    for (const text of head) { const cell = make("th", text); cell.scope = "col"; line.append(cell); }
  }
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((text, at) => { const cell = make(at ? "td" : "th", text); if (!at) cell.scope = "row"; line.append(cell); });
  }
}

function fillTiles(run) {
  get("tiles").replaceChildren(...run.tiles.map((tile) => {
    const box = make("div");
    box.append(make("dt", tile.label), make("dd", tile.value, "value"), make("dd", tile.note, "quiet"));
    return box;
  }));
  get("notes").replaceChildren(...run.notes.map((note) => make("p", note, "note")));
}

const ANSWERS = {no: "no lasting harm", "a little": "a little harm", yes: "it mattered", open: "open"};

function card(incident) {
  const box = make("article", null, "card " + (incident.outcome === "rolled back" ? "rolled" : incident.outcome === "sat through" ? "sat" : ""));
  box.id = `incident-${incident.id}`;
  box.tabIndex = -1;
  const bar = make("div", null, "bar");
  const link = make("a", `Step ${incident.step.toLocaleString("en")}`);
  link.href = `#${box.id}`;
  const title = make("h3");
  title.append(link, document.createTextNode(" \u00b7 "), make("span", incident.title));
  const show = make("button", "Show in the curves");
  show.type = "button";
  show.addEventListener("click", () => showIncident(incident));
  bar.append(title, make("span", incident.outcome, "tag"));
  if (incident.outcome !== "told") bar.append(make("span", ANSWERS[incident.answer], `tag ${incident.answer.replace(" ", "-")}`));
  bar.append(show);
  const list = make("dl");
  for (const [name, text] of [["What happened", incident.what], ["What was lost", incident.lost], ["Did it matter?", incident.mattered]]) {
    const value = make("dd");
    value.append(sentence(text));
    list.append(make("dt", name), value);
  }
  box.append(bar, list);
  if (incident.details.length) {
    const more = make("details");
    const table = make("table");
    fillTable(table, null, incident.details);
    more.append(make("summary", "What the governor thought"), table);
    box.append(more);
  }
  return box;
}

// What hovering over an incident tells; the chart library's own labels neither wrap nor fit.
function peek(incident, element, event) {
  const box = get("peek");
  box.hidden = !incident;
  if (!incident) return;
  const table = make("table");
  fillTable(table, null, [["Lost", incident.lost], ...incident.details]);
  const what = make("p"), mattered = make("p");
  what.append(sentence(incident.what));
  mattered.append(sentence(incident.mattered));
  box.replaceChildren(make("strong", `${incident.title}, ${incident.outcome}`), what, mattered, table, make("p", "Click: to the table", "quiet"));
  const chart = element.getBoundingClientRect(), mine = box.getBoundingClientRect();
  const at = event && event.clientX !== undefined ? event.clientX : chart.left + chart.width / 2;
  box.style.left = `${Math.max(6, Math.min(at - mine.width / 2, document.documentElement.clientWidth - mine.width - 6))}px`;
  const below = chart.bottom - 24;
  box.style.top = `${below + mine.height < window.innerHeight ? below : Math.max(6, chart.top - mine.height)}px`;
}

const MOST_CARDS = 200;

function fillIncidents(run) {
  const wanted = get("outcome").value, words = get("find").value.trim().toLowerCase();
  const fits = run.incidents.filter((each) => (!wanted || each.outcome === wanted) &&
    (!words || [each.step, each.end, each.title, each.reason, each.what, each.outcome, ...each.details.flat()].join(" ").toLowerCase().includes(words)));
  get("list").replaceChildren(...fits.slice(0, MOST_CARDS).map(card));
  const more = fits.length > MOST_CARDS ? `; the first ${MOST_CARDS} are listed, filter for others` : "";
  put(get("shown"), run.incidents.length ? `${fits.length} of ${run.incidents.length} incidents${more}` : "Nothing went wrong.");
}

function fillOutcomes(run) {
  const select = get("outcome"), chosen = select.value;
  const known = [...new Set(run.incidents.map((each) => each.outcome))];
  select.replaceChildren(new Option("everything", ""), ...known.map((name) => new Option(name, name)));
  select.value = known.includes(chosen) ? chosen : "";
}

function fillSettings(run) {
  fillTable(get("settings"), ["Name", "Value"], run.settings);
  get("config").hidden = !run.settings.length;
  const links = run.links.flatMap(([name, href]) => {
    const link = make("a", name);
    link.href = href;
    return [link, document.createTextNode(" \u00b7 ")];
  });
  get("links").replaceChildren(document.createTextNode("Raw files: "), ...links.slice(0, -1));
  get("links").hidden = !links.length;
}

function fillComparison(comparison) {
  get("compare").hidden = !comparison;
  if (!comparison) return;
  fillTable(get("beside"), comparison.head, comparison.rows);
  get("pairs").replaceChildren(...comparison.pairs.map((text) => { const p = make("p"); p.append(sentence(text)); return p; }));
  fillTable(get("differences"), comparison.differences.head, comparison.differences.rows);
  get("differs").hidden = !comparison.differences.rows.length;
}
