// Puts each chart into its place, and joins the controls to what they change.

const lineCharts = Object.fromEntries(data.lines.map((chart) => [chart.key, chart]));
const heatCharts = Object.fromEntries(data.heats.map((chart) => [chart.key, chart]));

for (const holder of document.querySelectorAll("[data-line]")) {
  drawNowAndAgain(() => drawLines(holder, lineCharts[holder.dataset.line]));
}
for (const holder of document.querySelectorAll("[data-heat]")) {
  drawNowAndAgain(() => drawHeat(holder, heatCharts[holder.dataset.heat]));
}
for (const holder of document.querySelectorAll("[data-scale]")) drawNowAndAgain(() => drawScale(holder));

if (text) {
  unpackLayers();
  buildTokens();
  buildControls();
  drawNowAndAgain(drawTokens);
  if (text.layers.length) drawNowAndAgain(drawSummaries);
}

function buildControls() {
  const found = views();
  chosen.view = found[0];
  const buttons = found.map((view) => {
    const button = node("button", { type: "button", "aria-pressed": view === chosen.view, "data-view": view }, VIEWS[view]);
    button.addEventListener("click", () => choose({ view }));
    return button;
  });
  const controls = document.getElementById("controls");
  if (found.length > 1) controls.append(node("fieldset", { "aria-label": "color by" }, ...buttons));
  if (text.layers.length) {
    const numbers = text.layers.map((layer) => `${layer.layer}`);
    chosen.layer = numbers.length > 1 ? "all" : numbers[0];
    const layers = numbers.length > 1 ? [["all", "all layers"]] : [];
    const list = selector("layer", [...layers, ...numbers.map((number) => [number, `layer ${number}`])], (layer) => choose({ layer }));
    const most = Math.max(...text.layers.map((layer) => layer.numExperts));
    const experts = Array.from({ length: most }, (_, i) => [`${i}`, `expert ${i}`]);
    controls.append(list, selector("expert", experts, (expert) => choose({ expert: Number(expert), view: "expert" })));
  }
  controls.append(node("div", { class: "scale", id: "token-scale" }));
  syncControls();
}

function selector(name, choices, act) {
  const list = node("select", { id: `choose-${name}`, "aria-label": name }, ...choices.map(([value, label]) => node("option", { value }, label)));
  list.addEventListener("change", () => act(list.value));
  return node("label", {}, list);
}

function choose(change) {
  Object.assign(chosen, change);
  // Experts of different layers have nothing in common but their numbers.
  if (chosen.view === "expert" && chosen.layer === "all") {
    if (change.layer === "all") chosen.view = views()[0];
    else chosen.layer = `${text.layers[0].layer}`;
  }
  syncControls();
  drawTokens();
  if (text.layers.length) drawSummaries();
}

function syncControls() {
  for (const button of document.querySelectorAll("#controls button")) {
    button.setAttribute("aria-pressed", button.dataset.view === chosen.view);
  }
  const [layers, experts] = ["layer", "expert"].map((name) => document.getElementById(`choose-${name}`));
  if (!layers) return;
  layers.value = chosen.layer;
  experts.value = `${chosen.expert}`;
  experts.parentElement.hidden = chosen.view !== "expert";
}

function drawSummaries() {
  const summary = text.summaries[chosen.layer];
  const charts = { histogram: histogramChart, position: positionChart, loss: lossChart };
  for (const holder of document.querySelectorAll("[data-bars]")) drawBars(holder, charts[holder.dataset.bars](summary));
  const note = document.getElementById("correlation");
  if (note) {
    const told = (value) => (value === null ? "none" : (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2));
    const { nll, next_nll: next } = summary.correlation;
    note.textContent = `Rank correlation of K with the NLL of the token ${told(nll)}, of the prediction ${told(next)}.`;
  }
  drawTypical();
}
