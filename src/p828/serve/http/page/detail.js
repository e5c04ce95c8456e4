// One token in detail: how probable it was, what else was, and the experts that made it.

const LEVELS = [0.02, 0.1, 0.3, 0.6, 0.9]; // a token's level is the number of these that its probability reaches
const ROWS = 5;

export const levelOf = (p) => LEVELS.filter((least) => p >= least).length;
export const percent = (p) => (p >= 0.9995 ? "100%" : p < 0.001 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`);

/** Text with its white space made visible. */
export const spelled = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** What is shown of a token of `tokensOf`; `place` says which it is, `count` how many experts a layer has. */
export function detailOf(token, place, count) {
  const p = Math.exp(token.logprob);
  const name = element("p", { className: "spelled", textContent: spelled(token.text || token.name) });
  name.dataset.level = levelOf(p);
  const probable = `${percent(p)} probable (log-probability ${token.logprob.toFixed(3).replace("-", "−")})`;
  return [
    name,
    element("p", { className: "quiet", textContent: token.text ? place : `${place}, without text of its own` }),
    element("p", { textContent: probable }),
    element("h2", { textContent: "Likeliest here" }),
    likeliestTable(token),
    element("h2", { textContent: `Experts by layer, of ${count}, the best first` }),
    expertsTable(token.experts, count),
  ];
}

function likeliestTable({ name, logprob, likeliest }) {
  const isChosen = ([other]) => other === name;
  const rows = [...likeliest].sort((a, b) => b[1] - a[1]).slice(0, ROWS);
  if (!rows.some(isChosen)) rows.push([name, logprob]);
  return element("table", { id: "likeliest" }, ...rows.map((row) => likeliestRow(row, isChosen(row))));
}

function likeliestRow([text, logprob], chosen) {
  const p = Math.exp(logprob);
  const row = element("tr", { className: chosen ? "chosen" : "" });
  row.append(element("td", { textContent: chosen ? "✓" : "", ariaLabel: chosen ? "chosen" : "" }));
  row.append(element("th", { scope: "row", className: "spelling", textContent: spelled(text), title: spelled(text) }));
  row.append(element("td", { className: "number", textContent: percent(p) }));
  row.append(element("td", {}, element("meter", { value: p, ariaHidden: "true" })));
  return row;
}

function expertsTable(layers, count) {
  if (!layers) return element("p", { className: "quiet", textContent: "Not known: reading the prompt gave this token." });
  return element("table", { id: "experts" }, ...layers.map((experts, layer) => {
    const name = element("th", { scope: "row", textContent: `layer ${layer}` });
    return element("tr", {}, name, element("td", { textContent: experts.join(" ") }), element("td", {}, strip(experts, count)));
  }));
}

/** A cell an expert, those in use filled. */
function strip(experts, count) {
  const made = element("div", { className: "strip", ariaHidden: "true" });
  made.style.setProperty("--experts", count);
  made.append(...experts.map((expert, rank) => {
    const cell = element("i", { title: `expert ${expert}` });
    cell.style.gridArea = `1 / ${expert + 1}`;
    cell.style.opacity = 1 - (0.5 * rank) / experts.length;
    return cell;
  }));
  return made;
}
