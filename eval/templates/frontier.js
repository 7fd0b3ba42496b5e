// Plots every setting, and shows the images and scores of the one that is pointed at or has the focus.
const data = JSON.parse(document.querySelector("#data").textContent);
const plot = document.querySelector("#plot"), card = document.querySelector(".card");
const everything = document.querySelector("#everything"), drift = document.querySelector("#drift");

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  plot.append(made);
  return made;
}

// About six round numbers between two values.
function ticks(low, high) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) values.push(value);
  return [values, Math.max(0, -Math.floor(Math.log10(step)))];
}

function show(series, point, circle) {
  card.style.setProperty("--c", series.colour);
  card.querySelector("h3").textContent = series.label;
  card.querySelectorAll(".t").forEach((thumbnail, number) => {
    thumbnail.className = "t " + point.sheet;
    const columns = Number(getComputedStyle(thumbnail).getPropertyValue("--cols")), cell = 2 * point.cell + number;
    thumbnail.style.setProperty("--c", cell % columns);
    thumbnail.style.setProperty("--r", Math.floor(cell / columns));
    thumbnail.setAttribute("aria-label", "image of " + series.label + ", " + point.words);
  });
  card.querySelector(".words").textContent = point.words;
  const scores = ["DINO " + point.y.toFixed(3), "CLIP-T " + point.x.toFixed(3)];
  if (point.drift !== null) scores.push("drift " + point.drift.toFixed(3));
  card.querySelector(".scores").textContent = scores.join(", ");
  plot.querySelectorAll("circle[tabindex='0']").forEach((other) => other.setAttribute("tabindex", -1));
  circle.setAttribute("tabindex", 0);
}

// The points that no other point of the method beats in both scores.
function optimal(points, across) {
  let best = -Infinity;
  return [...points].sort((a, b) => across(b) - across(a) || b.y - a.y).filter((point) => {
    const better = point.y > best;
    best = Math.max(best, point.y);
    return better;
  });
}

function draw() {
  const width = Math.max(340, plot.clientWidth), height = Math.round(Math.min(560, 0.85 * width));
  const [left, right, top_, bottom] = [54, width - 14, 26, height - 50];
  const byDrift = Boolean(drift?.checked), value = (point) => (byDrift ? point.drift : point.x);
  const across = (point) => (byDrift ? -point.drift : point.x);
  const on = new Set([...document.querySelectorAll(".legend input[value]:checked")].map((input) => input.value));
  const all = data.series.flatMap((series) => series.points.filter((point) => !point.isBase));
  const some = all.filter((point) => everything.checked || (point.x >= data.left && point.y >= data.bottom));
  const shown = some.length ? some : all;
  const xs = [...shown.map(value), byDrift ? 0 : data.base.x], ys = shown.map((point) => point.y);
  const pad = (low, high) => [low - 0.04 * (high - low || 1), high + 0.04 * (high - low || 1)];
  const [x0, x1] = pad(Math.min(...xs), Math.max(...xs)), [y0, y1] = pad(Math.min(...ys), Math.max(...ys));
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
  const py = (y) => bottom - ((y - y0) / (y1 - y0)) * (bottom - top_);
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.replaceChildren();
  const clip = element("clipPath", { id: "frame" });
  clip.append(element("rect", { x: left, y: top_, width: right - left, height: bottom - top_ }));
  const [xTicks, xDigits] = ticks(x0, x1), [yTicks, yDigits] = ticks(y0, y1);
  for (const x of xTicks) {
    element("line", { x1: px(x), x2: px(x), y1: top_, y2: bottom, stroke: "#eee" });
    element("text", { x: px(x), y: bottom + 18, "text-anchor": "middle" }, x.toFixed(xDigits));
  }
  for (const y of yTicks) {
    element("line", { x1: left, x2: right, y1: py(y), y2: py(y), stroke: "#eee" });
    element("text", { x: left - 8, y: py(y) + 4, "text-anchor": "end" }, y.toFixed(yDigits));
  }
  element("text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, byDrift ? "drift" : "CLIP-T (prompt fidelity)");
  element("text", { transform: `translate(14 ${(top_ + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "DINO (subject fidelity)");
  if (!byDrift) for (const [x, dash, name] of [[data.base.x, "6 4", "base"], [data.target, "2 4", "target"]]) {
    element("line", { x1: px(x), x2: px(x), y1: top_, y2: bottom, stroke: "#777", "stroke-dasharray": dash });
    element("text", { x: px(x), y: top_ - 8, "text-anchor": name === "base" ? "middle" : "end" }, name);
  }
  const visible = data.series.filter((series) => on.has(series.key));
  for (const series of visible) {
    const line = optimal(series.points, across).map((point) => `${px(value(point))},${py(point.y)}`).join(" ");
    element("polyline", { points: line, fill: "none", stroke: series.colour, "stroke-width": 2, "stroke-dasharray": series.dash, "clip-path": "url(#frame)" });
  }
  for (const series of visible) for (const point of [...series.points].sort((a, b) => value(a) - value(b))) {
    if (value(point) < x0 || value(point) > x1 || point.y < y0 || point.y > y1) continue;
    const circle = element("circle", { cx: px(value(point)), cy: py(point.y), r: width < 500 ? 3.5 : 5, fill: series.colour, "fill-opacity": 0.65,
      stroke: "#fff", "stroke-width": 0.8, tabindex: -1, role: "img", "aria-label": `${series.label}, ${point.words}` });
    circle.addEventListener("pointerenter", () => show(series, point, circle));
    circle.addEventListener("click", () => circle.focus());
    circle.addEventListener("focus", () => show(series, point, circle));
  }
  plot.querySelector("circle")?.setAttribute("tabindex", 0);
}

plot.addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const circles = [...plot.querySelectorAll("circle")], current = circles.indexOf(document.activeElement);
  if (!move || current < 0) return;
  event.preventDefault();
  circles[(current + move + circles.length) % circles.length].focus();
});
document.querySelectorAll(".legend input").forEach((input) => input.addEventListener("change", draw));
draw();
addEventListener("resize", draw);
