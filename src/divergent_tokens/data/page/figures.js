"use strict";
// Draws a figure when it comes near the window, in the theme's colours; switches its views.
const FIGURES = new Map(DATA.figures.map((figure) => [figure.name, figure]));
const drawn = new Set();
const coarse = window.matchMedia("(pointer: coarse)").matches;

function colourOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function themed(layout) {
  const found = {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colourOf("ink"), size: 12.5, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: {
      bgcolor: colourOf("card"),
      bordercolor: colourOf("soft"),
      font: { color: colourOf("ink"), size: 13 },
      align: "left",
    },
    dragmode: coarse ? false : "zoom",
  };
  for (const key of Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name))) {
    found[key] = {
      ...layout[key],
      gridcolor: colourOf("grid"),
      linecolor: colourOf("line"),
      zerolinecolor: colourOf("grid"),
    };
  }
  return found;
}

function layoutOf(figure) {
  const view = figure.views.length ? figure.views[figure.view || 0].layout : {};
  return themed({ ...figure.layout, ...view });
}

function tracesOf(figure) {
  if (!figure.views.length) return figure.data;
  const there = new Set(figure.views[figure.view || 0].traces);
  return figure.data.map((trace, i) => ({ ...trace, visible: there.has(i) }));
}

function draw(name) {
  const figure = FIGURES.get(name);
  const place = document.getElementById(`figure-${name}`);
  const options = {
    responsive: true,
    displaylogo: false,
    displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "pan2d"],
  };
  drawn.add(name);
  return Plotly.react(place, tracesOf(figure), layoutOf(figure), options).then(() => {
    place.style.minHeight = "";
    place.dataset.drawn = "yes";
  });
}

const nearby = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      nearby.unobserve(entry.target);
      draw(entry.target.id.replace("figure-", ""));
    }
  },
  { rootMargin: "400px" },
);
// Plotly is the last script of the page.
document.addEventListener("DOMContentLoaded", () =>
  document.querySelectorAll(".plot").forEach((place) => nearby.observe(place)),
);
document.addEventListener("themechange", () => drawn.forEach(draw));
window.addEventListener("beforeprint", () => [...FIGURES.keys()].forEach(draw));

document.querySelectorAll("select.view").forEach((choice) =>
  choice.addEventListener("change", () => {
    FIGURES.get(choice.dataset.figure).view = Number(choice.value);
    draw(choice.dataset.figure);
  }),
);
