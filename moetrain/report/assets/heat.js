// One layer over steps: a column is a stretch of steps, a row an expert or a number of experts.

const LOWEST = -5, BYTE_STEP = 15 / 254; // as `pack_ratios` in thinning.py writes them

function heatValue(chart, byte) {
  if (chart.scale === "share") return byte / 255;
  return byte === 0 ? 0 : 2 ** ((byte - 1) * BYTE_STEP + LOWEST);
}

function heatColors(scale) {
  if (scale === "share") {
    const colors = ramp("low", "mid", "high");
    return (value) => colors(Math.sqrt(value)); // rare Ks should be seen
  }
  const colors = ramp("under", "even", "over");
  return (value) => colors(ratioPlace(value));
}

function drawHeat(holder, chart) {
  chart.bytes ??= bytes(chart.cells);
  const columns = chart.spans.length, rows = chart.rows;
  const colors = heatColors(chart.scale);
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, rows];
  const image = small.getContext("2d").createImageData(columns, rows);
  for (let column = 0; column < columns; column++) {
    for (let row = 0; row < rows; row++) {
      const rgb = colors(heatValue(chart, chart.bytes[column * rows + row]));
      image.data.set([...rgb, 255], 4 * (rowPlace(chart, row) * columns + column));
    }
  }
  small.getContext("2d").putImageData(image, 0, 0);
  const labels = node("div", { class: "rows" });
  const canvas = node("canvas");
  const axis = node("div", { class: "axis" });
  holder.replaceChildren(node("div", { class: "heat" }, labels, canvas, node("span"), axis));
  const last = chart.firstRow + rows - 1;
  const ends = chart.scale === "share" ? [last, chart.firstRow] : [chart.firstRow, last];
  labels.append(...(rows > 1 ? ends : [chart.firstRow]).map((row) => node("span", {}, `${row}`)));
  const [from, to] = [chart.spans[0][0], chart.spans[columns - 1][1]];
  axis.append(node("span", {}, `step ${from.toLocaleString("en")}`), node("span", {}, to.toLocaleString("en")));
  magnify(canvas, small, rows);
  canvas.addEventListener("pointermove", (event) => hoverHeat(event, canvas, chart));
  canvas.addEventListener("pointerleave", hideTooltip);
}

// Larger numbers of experts stand above smaller ones, as on any axis; experts are a list and begin at the top.
function rowPlace(chart, row) {
  return chart.scale === "share" ? chart.rows - 1 - row : row;
}

function magnify(canvas, small, rows) {
  const height = Math.min(Math.max(rows * 11, 60), 260), sharp = Math.max(1, devicePixelRatio);
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(canvas.clientWidth * sharp);
  canvas.height = Math.round(height * sharp);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (rows > 20) return;
  pen.fillStyle = color("card");
  for (let row = 1; row < rows; row++) pen.fillRect(0, Math.round((row / rows) * canvas.height), canvas.width, sharp);
}

function hoverHeat(event, canvas, chart) {
  const box = canvas.getBoundingClientRect();
  const place = (offset, size, count) => Math.min(Math.max(Math.floor((offset / size) * count), 0), count - 1);
  const column = place(event.clientX - box.left, box.width, chart.spans.length);
  const row = rowPlace(chart, place(event.clientY - box.top, box.height, chart.rows));
  const value = heatValue(chart, chart.bytes[column * chart.rows + row]);
  const [from, to] = chart.spans[column];
  const steps = from === to ? `step ${from.toLocaleString("en")}` : `steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")}`;
  const text = chart.scale === "share" ? `${short(100 * value)}% of tokens` : `${value.toFixed(2)}× the mean load`;
  showTooltip(event.clientX, event.clientY, node("b", {}, `${chart.rowName} ${chart.firstRow + row}`), node("div", {}, text), node("div", {}, steps));
}

function drawScale(holder) {
  const share = holder.dataset.scale === "share";
  const colors = heatColors(holder.dataset.scale);
  const bar = gradient((place) => colors(share ? place : 2 ** (4 * place - 2)));
  const labels = share ? ["0", "50%", "100%"] : ["¼×", "½×", "mean", "2×", "4×"];
  holder.replaceChildren(node("i", { style: `background: ${bar}` }), node("span", {}, ...labels.map((label) => node("b", {}, label))));
}
