"use strict";
// Copies a command, by the clipboard or, where a page from disk may not use it, by a selection.
async function copy(button) {
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code);
    if (!document.execCommand("copy")) return;
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", () => copy(button)));
document.documentElement.dataset.ready = "yes";
