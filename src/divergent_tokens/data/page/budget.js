"use strict";
// Chooses for the slider's budget, from the sweep's sensitivities, what the figure's line shows.

// Steps from the base downwards, cheapest harm per byte first: along each component's convex hull.
// The start of each is its option of least harm, which is the base unless a KL is negative.
function stepsOf(sweep) {
  const start = [];
  const steps = [];
  sweep.components.forEach(([baseBytes, options], c) => {
    const points = [[null, 0, baseBytes], ...options].sort((a, b) => a[1] - b[1] || a[2] - b[2]);
    const hull = [points[0]];
    for (const point of points.slice(1)) {
      if (point[2] >= hull[hull.length - 1][2]) continue;
      while (hull.length > 1 && price(hull.at(-2), hull.at(-1)) >= price(hull.at(-1), point)) hull.pop();
      hull.push(point);
    }
    start.push(hull[0]);
    for (let i = 1; i < hull.length; i++) {
      steps.push({ component: c, to: hull[i], price: price(hull[i - 1], hull[i]) });
    }
  });
  steps.sort((a, b) => a.price - b.price);
  return { start, steps };
}

function price(from, to) {
  return (to[1] - from[1]) / (from[2] - to[2]);
}

// The choice that fits: steps until it does, and then what room is left spent on less harm.
function choose(sweep, limit) {
  sweep.found ||= stepsOf(sweep);
  const chosen = [...sweep.found.start];
  let size = chosen.reduce((sum, option) => sum + option[2], 0);
  for (const step of sweep.found.steps) {
    if (size <= limit) break;
    size += step.to[2] - chosen[step.component][2];
    chosen[step.component] = step.to;
  }
  const better = [];
  sweep.components.forEach(([baseBytes, options], c) => {
    for (const option of [[null, 0, baseBytes], ...options]) {
      const gain = chosen[c][1] - option[1];
      const extra = option[2] - chosen[c][2];
      if (gain > 0) better.push({ c, option, rate: gain / Math.max(extra, 1e-9) });
    }
  });
  better.sort((a, b) => b.rate - a.rate);
  for (const { c, option } of better) {
    const extra = option[2] - chosen[c][2];
    if (option[1] < chosen[c][1] && size + extra <= limit) {
      size += extra;
      chosen[c] = option;
    }
  }
  return { chosen, size, kl: chosen.reduce((sum, option) => sum + option[1], 0) };
}

// SDT and FDT with their bounds at a KL, between two rows of the flip law's table.
function expectedAt(table, kl) {
  if (kl > table[table.length - 1][0]) return null;
  const i = table.findIndex((row) => row[0] >= kl);
  if (i === 0) return table[0].slice(1);
  const [low, high] = [table[i - 1], table[i]];
  const part = Math.log(kl / low[0]) / Math.log(high[0] / low[0]);
  return low.slice(1).map((value, k) => (1 - part) * value + part * high[k + 1]);
}

function outcome(sweep, share) {
  const base = sweep.components.reduce((sum, [bytes]) => sum + bytes, 0);
  const found = choose(sweep, share * base);
  const expected = expectedAt(sweep.table, found.kl);
  const counts = new Map();
  for (const [scheme] of found.chosen) {
    const name = scheme === null ? "as it was" : sweep.schemes[scheme];
    counts.set(name, (counts.get(name) || 0) + 1);
  }
  return { ...found, share: found.size / base, bits: (8 * found.size) / sweep.n_parameters, expected, counts };
}

function setUp(box) {
  const sweep = DATA.sweeps[Number(box.dataset.sweep)];
  const input = box.querySelector("input");
  const base = sweep.components.reduce((sum, [bytes]) => sum + bytes, 0);
  const least = sweep.components.reduce(
    (sum, [bytes, options]) => sum + Math.min(bytes, ...options.map((option) => option[2])), 0);
  input.min = (Math.ceil((1000 * least) / base) / 10).toFixed(1);
  input.value = Math.max(60, Number(input.min));
  input.addEventListener("input", () => show(box, sweep, Number(input.value) / 100));
  show(box, sweep, Number(input.value) / 100);
}

function show(box, sweep, share) {
  const found = outcome(sweep, share);
  const [sdt, fdt] = found.expected ? [found.expected.slice(0, 3), found.expected.slice(3)] : [null, null];
  const beyond = "no prediction: KL above 0.3";
  put(box, "size", `${(found.size / 1e6).toFixed(1)} MB`, percent(found.share));
  put(box, "bits", number(found.bits));
  put(box, "kl", number(found.kl), "nats per token");
  put(box, "sdt", sdt ? percent(sdt[0]) : "–", sdt ? `${percent(sdt[1], 2)} to ${percent(sdt[2], 2)}` : beyond);
  put(box, "fdt", fdt ? number(fdt[0]) : "–", fdt ? `${number(fdt[1], 2)} to ${number(fdt[2], 2)} tokens` : beyond);
  put(box, "schemes", [...found.counts].map(([name, n]) => `${n} x ${name}`).join(", "));
  box.querySelector("input").setAttribute(
    "aria-valuetext", `${percent(found.share)} of the bytes, FDT ${fdt ? number(fdt[0]) : "unknown"}`);
  mark(box.dataset.figure, found, sdt, fdt);
}

function put(box, name, value, below = "") {
  const place = box.querySelector(`[data-value="${name}"]`);
  place.replaceChildren(document.createTextNode(value));
  if (below) place.append(element("small", "", below));
}

// The ring on the figure's line, in every view of it: FDT, SDT, KL as figures/budget.py orders them.
function mark(name, found, sdt, fdt) {
  const figure = FIGURES.get(name);
  const values = [fdt ? fdt[0] : null, sdt ? sdt[0] : null, found.kl || null];
  const rings = figure.data.filter((trace) => trace.meta === "slider");
  rings.forEach((trace, i) => {
    trace.x = values[i] === null ? [] : [found.share];
    trace.y = values[i] === null ? [] : [values[i]];
  });
  if (drawn.has(name)) draw(name);
}

document.querySelectorAll(".slider").forEach(setUp);
