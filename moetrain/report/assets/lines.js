// Lines over steps.

const ROLES = { first: "first", second: "second", reference: "reference" };

function drawLines(holder, chart) {
  const layers = chart.lines.filter((line) => line.role === "layer");
  const depth = ramp("layer-low", "layer-high");
  const lines = chart.lines.map((line) => ({
    ...line,
    points: line.steps.map((step, i) => [step, line.values[i]]),
    color: line.role === "layer" ? css(depth(layers.indexOf(line) / Math.max(1, layers.length - 1))) : color(ROLES[line.role]),
  }));
  const frame = lineFrame(holder, chart, lines);
  const paths = lines.map((line) => linePath(line, frame, layers.length > 12));
  const cross = shape("line", { y1: frame.top, y2: frame.bottom, class: "baseline", visibility: "hidden" });
  const picture = shape("svg", { viewBox: `0 0 ${frame.width} ${frame.height}`, height: frame.height, role: "img" });
  picture.append(...frame.marks, cross, ...paths);
  picture.addEventListener("pointermove", (event) => hoverLines(event, picture, frame, lines, cross));
  picture.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    hideTooltip();
  });
  holder.replaceChildren(lineLegend(lines, layers, depth), picture);
}

function lineFrame(holder, chart, lines) {
  const width = Math.max(240, holder.clientWidth), height = 200;
  const frame = { width, height, left: 46, right: width - 10, top: 8, bottom: height - 22, marks: [] };
  const values = lines.flatMap((line) => line.values).filter((value) => value !== null);
  const steps = lines.flatMap((line) => line.steps);
  let [low, high] = extent(values), [first, last] = extent(steps);
  if (first === last) [first, last] = [first - 1, last + 1];
  const bend = chart.log ? Math.log10 : (value) => value;
  if (!chart.log) {
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    [low, high] = [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  } else if (low === high) [low, high] = [low / 2, high * 2];
  frame.x = (step) => frame.left + ((step - first) / (last - first)) * (frame.right - frame.left);
  frame.y = (value) =>
    frame.bottom - ((bend(value) - bend(low)) / (bend(high) - bend(low))) * (frame.bottom - frame.top);
  for (const value of chart.log ? logTicks(low, high) : ticks(low, high, 4)) {
    if (value > high * (1 + 1e-9)) continue;
    const y = frame.y(value);
    frame.marks.push(shape("line", { x1: frame.left, x2: frame.right, y1: y, y2: y, class: "gridline" }));
    frame.marks.push(shape("text", { x: frame.left - 6, y: y + 4, "text-anchor": "end" }, short(value)));
  }
  const wide = frame.right - frame.left > 420 ? 6 : 4;
  for (const step of ticks(first, last, wide).filter(Number.isInteger)) {
    frame.marks.push(shape("text", { x: frame.x(step), y: height - 5, "text-anchor": "middle" }, short(step)));
  }
  frame.marks.push(shape("line", { x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom, class: "baseline" }));
  return frame;
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function logTicks(low, high) {
  const found = [];
  const factors = Math.log10(high / low) > 3 ? [1] : Math.log10(high / low) > 1.5 ? [1, 3] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    found.push(...factors.map((factor) => factor * 10 ** power));
  }
  return found.filter((value) => value >= low && value <= high);
}

// Values that are not finite break the line.
function linePath(line, frame, crowded) {
  let path = "", pen = "M";
  for (const [step, value] of line.points) {
    if (value !== null) path += `${pen}${frame.x(step).toFixed(1)} ${frame.y(value).toFixed(1)}`;
    pen = value === null ? "M" : "L";
  }
  const style = { fill: "none", stroke: line.color, "stroke-linejoin": "round", "stroke-linecap": "round" };
  style["stroke-width"] = line.role === "reference" ? 1.5 : line.role === "layer" ? 1.6 : 2;
  if (line.role === "reference") style["stroke-dasharray"] = "5 4";
  if (line.role === "layer" && crowded) Object.assign(style, { "stroke-width": 1, opacity: 0.6 });
  const group = shape("g", {}, shape("path", { d: path, ...style }));
  const known = line.points.filter(([, value]) => value !== null);
  if (line.role !== "reference" && known.length <= 25) {
    const dots = known.map(([step, value]) => shape("circle", { cx: frame.x(step), cy: frame.y(value), r: 2.5, fill: line.color }));
    group.append(...dots);
  }
  return group;
}

function lineLegend(lines, layers, depth) {
  const legend = node("div", { class: "legend" });
  if (lines.length === 1 && layers.length === 0) return legend;
  const many = layers.length > 6;
  if (many) {
    const bar = node("i", { class: "ramp", style: `background: ${gradient(depth)}` });
    legend.append(node("span", {}, bar, `${layers[0].label} to ${layers[layers.length - 1].label.replace("layer ", "")}`));
  }
  for (const line of lines) {
    if (line.role === "layer" && many) continue;
    const kind = line.role === "reference" ? "dashed" : "";
    legend.append(node("span", {}, node("i", { class: kind, style: `border-color: ${line.color}` }), line.label));
  }
  return legend;
}

function hoverLines(event, picture, frame, lines, cross) {
  const box = picture.getBoundingClientRect();
  const at = ((event.clientX - box.left) / box.width) * frame.width;
  const height = ((event.clientY - box.top) / box.height) * frame.height;
  const near = lines.filter((line) => line.role !== "reference").map((line) => nearestPoint(line, frame, at));
  const step = near.reduce((best, found) => (Math.abs(frame.x(found.step) - at) < Math.abs(frame.x(best.step) - at) ? found : best)).step;
  cross.setAttribute("x1", frame.x(step));
  cross.setAttribute("x2", frame.x(step));
  cross.setAttribute("visibility", "visible");
  const levels = lines.filter((line) => line.role === "reference").map((line) => ({ line, step: null, value: line.values[0] }));
  let rows = [...near, ...levels];
  if (rows.length > 12) {
    const away = (row) => (row.value === null ? Infinity : Math.abs(frame.y(row.value) - height));
    rows = rows.sort((a, b) => away(a) - away(b)).slice(0, 6);
  }
  const table = node("table", {}, ...rows.map((row) => hoverRow(row, step)));
  showTooltip(event.clientX, event.clientY, node("b", {}, `step ${step.toLocaleString("en")}`), table);
}

function nearestPoint(line, frame, at) {
  let low = 0, high = line.steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (frame.x(line.steps[middle]) < at) low = middle;
    else high = middle;
  }
  const i = Math.abs(frame.x(line.steps[low]) - at) < Math.abs(frame.x(line.steps[high]) - at) ? low : high;
  return { line, step: line.steps[i], value: line.values[i] };
}

function hoverRow({ line, step, value }, shown) {
  const where = step !== null && step !== shown ? ` (step ${step.toLocaleString("en")})` : "";
  const swatch = node("i", { style: `background: ${line.color}` });
  return node("tr", {}, node("td", {}, swatch, line.label + where), node("td", {}, value === null ? "not finite" : `${+value.toPrecision(4)}`));
}
