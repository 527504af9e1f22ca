// Bars over a few named places.

function drawBars(holder, chart) {
  const width = Math.max(240, holder.clientWidth), height = 190, left = 40, bottom = height - 36, top = 14;
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const values = chart.series.flatMap((series) => series.values).filter((value) => value !== null);
  const high = Math.max(...values, 1e-12) * 1.08;
  const y = (value) => bottom - (value / high) * (bottom - top);
  for (const value of ticks(0, high, 4)) {
    picture.append(shape("line", { x1: left, x2: width - 4, y1: y(value), y2: y(value), class: "gridline" }));
    picture.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, chart.tick(value)));
  }
  const slot = (width - 4 - left) / chart.labels.length, count = chart.series.length;
  const bar = Math.max(2, Math.min(34, (slot * 0.78) / count));
  const skip = Math.ceil(Math.max(...chart.labels.map((label) => 6.5 * label.length + 4)) / slot);
  chart.labels.forEach((label, i) => {
    const middle = left + slot * (i + 0.5);
    const group = shape("g", {});
    chart.series.forEach((series, s) => {
      if (series.values[i] === null) return;
      const x = middle + bar * (s - count / 2) + 1;
      group.append(shape("path", { d: barPath(x, y(series.values[i]), bar - 2, bottom), fill: color(series.color) }));
    });
    group.append(shape("rect", { x: middle - slot / 2, y: top, width: slot, height: bottom - top, fill: "transparent" }));
    group.addEventListener("pointermove", (event) => showTooltip(event.clientX, event.clientY, ...chart.tell(i)));
    group.addEventListener("pointerleave", hideTooltip);
    picture.append(group);
    if (i % skip === 0) picture.append(shape("text", { x: middle, y: bottom + 15, "text-anchor": "middle" }, label));
  });
  picture.append(shape("line", { x1: left, x2: width - 4, y1: bottom, y2: bottom, class: "baseline" }));
  picture.append(shape("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, chart.axis));
  const legend = node("div", { class: "legend" });
  if (count > 1) {
    for (const series of chart.series) {
      legend.append(node("span", {}, node("i", { class: "block", style: `background: ${color(series.color)}` }), series.label));
    }
  }
  holder.replaceChildren(legend, picture);
}

// Rounded at the end that carries the value, flat where the bar stands.
function barPath(x, y, width, bottom) {
  const r = Math.max(0, Math.min(3, width / 2, bottom - y));
  return `M${x} ${bottom}V${y + r}Q${x} ${y} ${x + r} ${y}H${x + width - r}Q${x + width} ${y} ${x + width} ${y + r}V${bottom}Z`;
}

function histogramChart(summary) {
  const used = summary.histogram.map((tokens, k) => ({ k, tokens })).filter(({ tokens }) => tokens > 0);
  const [low, high] = [used[0].k, used[used.length - 1].k];
  const rows = summary.histogram.slice(low, high + 1);
  const total = rows.reduce((sum, tokens) => sum + tokens, 0);
  return {
    labels: rows.map((_, i) => `${low + i}`),
    axis: "K",
    series: [{ label: "tokens", color: "first", values: rows.map((tokens) => tokens / total) }],
    tick: (value) => `${short(100 * value)}%`,
    tell: (i) => [node("b", {}, `K = ${low + i}`), node("div", {}, `${rows[i].toLocaleString("en")} of ${total.toLocaleString("en")} ${counted()} (${short((100 * rows[i]) / total)}%)`)],
  };
}

function positionChart(summary) {
  const rows = summary.byPosition;
  const label = (row) => (row.low === row.high ? `${row.low}` : `${row.low}–${row.high}`);
  return {
    labels: rows.map(label),
    axis: "position",
    series: [{ label: "mean K", color: "first", values: rows.map((row) => row.mean_k) }],
    tick: short,
    tell: (i) => [node("b", {}, `position ${label(rows[i])}`), node("div", {}, `mean K ${rows[i].mean_k.toFixed(2)} over ${rows[i].tokens.toLocaleString("en")} ${counted()}`)],
  };
}

function lossChart(summary) {
  const rows = summary.lossByK;
  const told = (value) => (value === null ? "none" : value.toFixed(3));
  return {
    labels: rows.map((row) => `${row.k}`),
    axis: "K",
    series: [
      { label: "of the token itself", color: "first", values: rows.map((row) => row.nll) },
      { label: "of the prediction made at it", color: "second", values: rows.map((row) => row.next_nll) },
    ],
    tick: short,
    tell: (i) => [
      node("b", {}, `K = ${rows[i].k}`),
      node("div", {}, `of the token itself ${told(rows[i].nll)}`),
      node("div", {}, `of the prediction made at it ${told(rows[i].next_nll)}`),
      node("div", {}, `${rows[i].tokens.toLocaleString("en")} ${counted()}`),
    ],
  };
}

// What the summaries count.
function counted() {
  return chosen.layer === "all" ? "(token, layer) pairs" : "tokens";
}
