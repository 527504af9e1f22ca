// What every drawing below uses: the embedded data, elements, colors, numbers, the tooltip, and when to draw again.

const data = JSON.parse(document.getElementById("data").textContent);

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function uint16(base64) {
  const view = new DataView(bytes(base64).buffer);
  return Array.from({ length: view.byteLength / 2 }, (_, i) => view.getUint16(2 * i, true));
}

// Text always goes in as text, never as HTML: tokens are other people's words.
function node(name, attributes = {}, ...children) {
  return furnished(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return furnished(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function furnished(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// --- colors, from the style sheet's variables, so that light, dark and paper each have their own

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function channels(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// A function from 0..1 to [r, g, b] through evenly spaced named colors.
function ramp(...names) {
  const stops = names.map((name) => channels(color(name)));
  return (share) => {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (place - low)));
  };
}

function css(rgb) {
  return `rgb(${rgb.join(" ")})`;
}

function gradient(colors) {
  return `linear-gradient(to right, ${Array.from({ length: 21 }, (_, i) => css(colors(i / 20))).join(", ")})`;
}

// Ink that can be read on a background: by its relative luminance.
function inkOn(rgb) {
  const [r, g, b] = rgb.map((value) => (value / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.24 ? "#171614" : "#f5f3ee";
}

// A load of 1/4 of the mean or less is one end, of 4 times the mean or more the other.
function ratioPlace(ratio) {
  return ratio <= 0 ? 0 : (Math.log2(ratio) + 2) / 4;
}

// --- numbers

function short(value) {
  if (value === null) return "not finite";
  const size = Math.abs(value);
  for (const [power, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= power) return `${trimmed((value / (letter === "k" ? 1e3 : power)).toPrecision(3))}${letter}`;
  }
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1).replace(".0e", "e").replace("e-", "e−");
  return trimmed(value.toPrecision(3));
}

function trimmed(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// --- tooltip

const tooltip = document.getElementById("tooltip");

function showTooltip(x, y, ...children) {
  tooltip.replaceChildren(...children);
  tooltip.hidden = false;
  const box = tooltip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
  const top = y + 16 + box.height > innerHeight ? innerHeight - box.height - 6 : y + 16;
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

// --- drawing again: for another width, other colors, or paper

const drawings = [];

function drawNowAndAgain(draw) {
  drawings.push(draw);
  draw();
}

function drawAll() {
  hideTooltip();
  for (const draw of drawings) draw();
}

let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== lastWidth) drawAll();
  lastWidth = innerWidth;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
matchMedia("print").addEventListener("change", drawAll);
addEventListener("scroll", hideTooltip, { passive: true });
