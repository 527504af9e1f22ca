// Text whose tokens carry a color, and what each of them did.

const text = data.text;
const chosen = { view: "nll", layer: "all", expert: 0 };
const VIEWS = { importance: "Importance", k: "K", nll: "NLL", expert: "Expert" };

function unpackLayers() {
  for (const layer of text.layers) {
    layer.k = uint16(layer.k);
    layer.experts = uint16(layer.experts);
    layer.weights = uint16(layer.weights).map((value) => value * layer.weightScale);
    layer.importance = layer.importance && uint16(layer.importance).map((value) => value * layer.importanceScale);
    layer.starts = [0];
    for (const k of layer.k) layer.starts.push(layer.starts[layer.starts.length - 1] + k);
  }
}

// What this model has: importance only where a router knows it, K only where tokens differ in it.
function views() {
  const found = [];
  if (text.layers.some((layer) => layer.importance)) found.push("importance");
  if (text.variableK) found.push("k");
  found.push("nll");
  if (text.layers.length) found.push("expert");
  return found;
}

function layerOf(number) {
  return text.layers.find((layer) => `${layer.layer}` === number);
}

function pairsOf(layer, token) {
  const pairs = [];
  for (let i = layer.starts[token]; i < layer.starts[token + 1]; i++) pairs.push([layer.experts[i], layer.weights[i]]);
  return pairs;
}

function tokenValue(token) {
  if (chosen.view === "nll") return text.nll[token];
  if (chosen.view === "expert") {
    const pair = pairsOf(layerOf(chosen.layer), token).find(([expert]) => expert === chosen.expert);
    return pair ? pair[1] : null;
  }
  const layers = chosen.layer === "all" ? text.layers : [layerOf(chosen.layer)];
  const values = layers.map((layer) => layer[chosen.view]).filter(Boolean).map((column) => column[token]);
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

function drawTokens() {
  const spans = document.querySelectorAll("#tokens .token");
  const values = Array.from(spans, (_, token) => tokenValue(token));
  const [low, high] = tokenRange(values);
  const colors = ramp("low", "mid", "high");
  spans.forEach((span, token) => {
    const value = values[token];
    const rgb = value === null ? null : colors((value - low) / (high - low || 1));
    span.style.background = rgb ? css(rgb) : "none";
    span.style.color = rgb ? inkOn(rgb) : "";
  });
  drawTokenScale(low, high, colors);
}

// From the 2nd to the 98th percentile, so that one odd token does not take all the color.
function tokenRange(values) {
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  if (!known.length) return [0, 1];
  if (chosen.view === "k" && chosen.layer !== "all") return [known[0], known[known.length - 1]];
  const at = (share) => known[Math.min(known.length - 1, Math.floor(share * known.length))];
  return [chosen.view === "nll" || chosen.view === "expert" ? 0 : at(0.02), at(0.98)];
}

function drawTokenScale(low, high, colors) {
  const unit = { nll: " nats", k: " experts", importance: "", expert: "" }[chosen.view];
  const what = { nll: "NLL", k: "K", importance: "importance", expert: `weight of expert ${chosen.expert}` }[chosen.view];
  const bar = node("i", { style: `background: ${gradient(colors)}` });
  const ends = [short(low), what + unit, short(high)].map((label) => node("b", {}, label));
  document.getElementById("token-scale").replaceChildren(bar, node("span", {}, ...ends));
}

// --- what stands there

function buildTokens() {
  const holder = document.getElementById("tokens");
  for (const { title, start, length } of text.passages) {
    const line = node("p");
    for (let token = start; token < start + length; token++) line.append(tokenSpan(token, token === start));
    holder.append(node("section", { class: "passage" }, node("h4", {}, title), line));
  }
  const tell = (event) => {
    const span = event.target.closest(".token");
    if (span) showTooltip(event.clientX, event.clientY, ...aboutToken(Number(span.dataset.token)));
    else hideTooltip();
  };
  holder.addEventListener("pointermove", tell);
  holder.addEventListener("click", tell);
  holder.addEventListener("pointerleave", hideTooltip);
  holder.addEventListener("scroll", hideTooltip, { passive: true });
}

// Line ends and tabs get a sign, so that they have a color, too.
function tokenSpan(token, begins) {
  const span = node("span", { class: "token", "data-token": token });
  const content = text.texts[token];
  if (begins || content === "") span.append(node("span", { class: "sign" }, begins ? "[start]" : "·"));
  for (const part of content.split(/([\n\t])/)) {
    if (part === "\n") span.append(node("span", { class: "sign" }, "↵"), "\n");
    else if (part === "\t") span.append(node("span", { class: "sign" }, "⇥"), "\t");
    else span.append(part);
  }
  return span;
}

function aboutToken(token) {
  const passage = text.passages.find(({ start, length }) => token >= start && token < start + length);
  const position = token - passage.start, nll = text.nll[token];
  const next = position + 1 < passage.length ? text.nll[token + 1] : null;
  const name = node("b", {}, node("code", {}, position === 0 ? "[start]" : JSON.stringify(text.texts[token])));
  const about = node("div", {}, `position ${position}, id ${text.ids[token]}`);
  const own = nll === null ? "nothing before it" : `NLL ${nll.toFixed(2)} (p = ${short(Math.exp(-nll))})`;
  const losses = node("div", {}, own + (next === null ? "" : `; of the next token ${next.toFixed(2)}`));
  return [name, about, losses, ...(text.layers.length ? [routingTable(token)] : [])];
}

function routingTable(token) {
  const importance = text.layers.some((layer) => layer.importance);
  const few = text.layers.length <= 12 || chosen.layer === "all" ? text.layers.slice(0, 12) : [layerOf(chosen.layer)];
  const head = ["layer", importance ? "importance" : null, "K", "experts and weights"].filter(Boolean);
  const table = node("table", {}, node("tr", {}, ...head.map((word) => node("th", {}, word))));
  for (const layer of few) {
    const cells = [`${layer.layer}`];
    if (importance) cells.push(layer.importance ? layer.importance[token].toFixed(3) : "");
    const pairs = pairsOf(layer, token).map(([expert, weight]) => `${expert}: ${weight.toFixed(2)}`);
    cells.push(`${layer.k[token]}`, pairs.slice(0, 8).join("  ") + (pairs.length > 8 ? " …" : ""));
    const mark = `${layer.layer}` === chosen.layer ? "chosen" : null;
    table.append(node("tr", { class: mark }, ...cells.map((cell) => node("td", {}, cell))));
  }
  if (few.length < text.layers.length) table.append(node("tr", {}, node("td", { colspan: 4 }, "choose a layer to see others")));
  return table;
}

// --- tokens of each expert

function drawTypical() {
  const holder = document.getElementById("typical");
  const experts = text.typical.layers[chosen.layer];
  if (!experts) {
    const why = chosen.layer === "all" ? "Choose a layer: expert 3 of one layer has nothing to do with expert 3 of another." : "Too many experts to list.";
    holder.replaceChildren(node("p", { class: "note" }, why));
    return;
  }
  const table = node("table", {}, node("tr", {}, node("th", {}, "expert"), node("th", {}, "tokens")));
  experts.forEach((tokens, expert) => {
    const chips = tokens.map(([token, times]) => {
      const [content, occurrences] = text.typical.tokens[token];
      const label = content === "" ? `#${token}` : JSON.stringify(content).slice(1, -1);
      return node("span", { class: "chip" }, node("code", {}, label), node("small", {}, ` ${times}/${occurrences}`));
    });
    table.append(node("tr", {}, node("td", {}, `${expert}`), node("td", {}, ...(chips.length ? chips : ["none"]))));
  });
  holder.replaceChildren(table);
}
