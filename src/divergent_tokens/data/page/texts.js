"use strict";
// The texts: which prompts, in which order, and each with both sides of its parting.
const TEXTS = DATA.texts;
const AT = Object.fromEntries(TEXTS.columns.map((name, i) => [name, i]));
const STEP = 20;
const controls = document.getElementById("text-controls");
let nShown = STEP;

function comparison() {
  return TEXTS.comparisons[Number(controls.elements.comparison.value)];
}

function candidate() {
  return comparison().candidates[Number(controls.elements.candidate.value)];
}

function fill(select, entries) {
  select.replaceChildren(
    ...entries.map(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      return option;
    }),
  );
}

function fillGroups(name, groups) {
  const found = [...new Set(groups.filter((group) => group !== null))].sort();
  const select = controls.elements[name];
  // A position, since a group may have any name.
  fill(select, [["", "all"], ...found.map((group, i) => [String(i), group])]);
  select.groups = found;
  select.parentElement.hidden = found.length < 2;
}

function fillForComparison() {
  fill(controls.elements.candidate, comparison().candidates.map((one, i) => [String(i), one.name]));
  fillGroups("domain", comparison().domains);
  fillGroups("language", comparison().languages);
}

function kindOf(row) {
  if (row[AT.censored]) return "whole";
  return row[AT.margin] < TEXTS.near_tie ? "tie" : "real";
}

const ORDERS = {
  fdt: (a, b) => a[AT.fdt] - b[AT.fdt],
  late: (a, b) => b[AT.fdt] - a[AT.fdt],
  kl: (a, b) => (b[AT.kl] ?? -1) - (a[AT.kl] ?? -1),
  prompt: () => 0,
};

function inGroup(name, group) {
  const select = controls.elements[name];
  return select.value === "" || select.groups[Number(select.value)] === group;
}

function wanted() {
  const { rows } = candidate();
  const kind = controls.elements.kind.value;
  const order = ORDERS[controls.elements.sort.value];
  return rows
    .map((row, i) => i)
    .filter((i) => inGroup("domain", comparison().domains[i]))
    .filter((i) => inGroup("language", comparison().languages[i]))
    .filter((i) => kind === "" || kindOf(rows[i]) === kind)
    .sort((a, b) => order(rows[a], rows[b]) || a - b);
}

function list() {
  const found = wanted();
  const n = Math.min(nShown, found.length);
  const all = candidate().rows.length;
  document.getElementById("text-count").textContent =
    `${found.length} of ${all} prompts${n < found.length ? `, the first ${n} shown` : ""}`;
  document.getElementById("text-list").replaceChildren(...found.slice(0, n).map(item));
  document.getElementById("text-more").hidden = n === found.length;
}

const KINDS = { whole: "never part", tie: "near tie", real: "real disagreement" };

function item(i) {
  const row = candidate().rows[i];
  const kind = kindOf(row);
  const made = element("li", "text");
  const head = element("h3");
  head.append(element("b", "", `Prompt ${i}`), element("b", kind, KINDS[kind]));
  head.append(element("span", "", facts(row, i)));
  made.append(head, element("pre", "prompt", comparison().texts[i]), sides(row, i));
  if (kind !== "whole") made.append(probabilities(row));
  return made;
}

function facts(row, i) {
  const said = row[AT.censored]
    ? [`all ${row[AT.n_tokens]} tokens alike`]
    : [`FDT ${row[AT.fdt]} of ${row[AT.n_tokens]}`, `${row[AT.n_divergent]} tokens differ`];
  if (row[AT.margin] !== null) said.push(`margin ${number(row[AT.margin])}`);
  if (row[AT.kl] !== null) said.push(`KL ${number(row[AT.kl] / row[AT.n_tokens])} a token`);
  return [...said, comparison().domains[i], comparison().languages[i]].filter(Boolean).join(" · ");
}

function sides(row, i) {
  const pieces = comparison().pieces[i];
  const shared = pieces.slice(0, row[AT.fdt]).join("");
  const made = element("div", "sides");
  const parted = row[AT.fdt];
  const own = row[AT.censored] ? null : pieces[parted] || row[AT.base_token];
  made.append(side("Base", shared, "base", own, pieces.slice(parted).join("")));
  const written = candidate().written[i];
  const name = candidate().name;
  if (row[AT.censored]) made.append(side(name, shared, "other", null, ""));
  else made.append(side(name, shared, "other", row[AT.candidate_token], written ?? null));
  return made;
}

// `rest` begins with the token, where it is known at all; a token alone may have lost its blank.
function side(name, shared, className, token, rest) {
  const made = element("div");
  const text = element("pre");
  text.append(element("span", "shared", shared));
  if (token !== null) {
    const start = rest === null ? token : beginning(rest, token);
    text.append(element("mark", className, visible(start || token)));
    if (rest === null) text.append(element("span", "unknown", " … not written (compare with --examples)"));
    else text.append(rest.slice(start.length));
  }
  made.append(element("h4", "", name), text);
  return made;
}

function beginning(rest, token) {
  if (rest.startsWith(token)) return token;
  const blanks = rest.length - rest.trimStart().length;
  const bare = token.trimStart();
  return bare !== "" && rest.startsWith(bare, blanks) ? rest.slice(0, blanks + bare.length) : "";
}

function visible(token) {
  return token.trim() === "" ? token.replaceAll("\n", "⏎").replaceAll(" ", "␣").replaceAll("\t", "⇥") || "∅" : token;
}

function probabilities(row) {
  const frame = element("div", "scroll");
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const name of ["token", "base says", "candidate says"]) {
    const cell = element("th", "", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const whose of ["base", "candidate"]) {
    const line = body.insertRow();
    const cell = element("th", "", `${whose}'s “${visible(row[AT[`${whose}_token`]])}”`);
    cell.scope = "row";
    line.append(cell);
    for (const model of ["p", "q"]) line.append(element("td", "", percent(row[AT[`${whose}_token_${model}`]])));
  }
  frame.append(table);
  return frame;
}

if (controls) {
  fill(controls.elements.comparison, TEXTS.comparisons.map((one, i) => [String(i), one.file]));
  controls.elements.comparison.parentElement.hidden = TEXTS.comparisons.length < 2;
  fillForComparison();
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("change", (event) => {
    if (event.target.name === "comparison") fillForComparison();
    nShown = STEP;
    list();
  });
  document.getElementById("text-more").addEventListener("click", () => {
    nShown += STEP;
    list();
  });
  list();
}
