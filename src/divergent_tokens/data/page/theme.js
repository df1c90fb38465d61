"use strict";
// What all scripts of the page share: the records' data, and light or dark.
const DATA = JSON.parse(document.getElementById("data").textContent);
const THEMES = ["system", "light", "dark"];
const themeButton = document.getElementById("theme");
const darkSystem = window.matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  if (theme === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = theme;
  themeButton.dataset.value = theme;
  themeButton.textContent = `Theme: ${theme}`;
  document.dispatchEvent(new Event("themechange"));
}

themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(themeButton.dataset.value) + 1) % THEMES.length];
  setTheme(next);
});
darkSystem.addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
setTheme("system");

// Three significant digits, as the tables have them.
function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Number(value.toExponential(digits - 1).split("e")[1]);
  if (size < -4 || size > 5) return value.toExponential(1);
  return value.toFixed(Math.max(0, digits - 1 - size));
}

// Near 100 % the digits count what is missing from it.
function percent(share, digits = 3) {
  if (share === null || share === undefined || Number.isNaN(share)) return "–";
  if (share === 0 || share === 1) return `${100 * share}%`;
  if (!(share > 0 && share < 1)) return `${number(100 * share, digits)}%`;
  if (share < 0.00001) return "<0.001%";
  if (share > 0.99999) return ">99.999%";
  const size = Math.floor(Math.log10(100 * Math.min(share, 1 - share)));
  const decimals = Math.max(digits - 2, digits - size - (share > 0.5 ? 2 : 1));
  return `${(100 * share).toFixed(Math.min(Math.max(decimals, 0), 3))}%`;
}

// An element with a class and text; text of records goes through here only, never through HTML.
function element(tag, className = "", text = null) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  return made;
}
