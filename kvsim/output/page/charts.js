// A chart's column says its values beside the pointer, and where the keyboard is; arrows go from column to column.
// Without this script the browser shows a column's title by itself, later.
function columnOf(target) {
  return target.closest ? target.closest(".column") : null;
}

function hideTips() {
  document.querySelectorAll(".tip").forEach((tip) => tip.remove());
}

function showTip(column) {
  const title = column.querySelector("title");
  if (title) {
    column.setAttribute("aria-label", title.textContent.replaceAll("\n", "; "));
    column.dataset.said = title.textContent;
    title.remove(); // the browser's own would stand upon ours
  }
  hideTips();
  const drawing = column.closest(".drawing");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("aria-hidden", "true");
  for (const line of column.dataset.said.split("\n")) {
    const row = document.createElement("div");
    row.textContent = line;
    tip.append(row);
  }
  drawing.append(tip);
  const mark = (column.querySelector(".guide") ?? column).getBoundingClientRect();
  const frame = drawing.getBoundingClientRect();
  const at = mark.left + (column.querySelector(".guide") ? 0 : mark.width / 2) - frame.left;
  const left = at + 12 + tip.offsetWidth > frame.width ? at - 12 - tip.offsetWidth : at + 12;
  tip.style.left = `${Math.max(0, Math.min(left, frame.width - tip.offsetWidth))}px`;
  tip.style.top = `${column.querySelector(".guide") ? 24 : mark.bottom - frame.top}px`;
}

document.addEventListener("pointerover", (event) => {
  const column = columnOf(event.target);
  if (column) showTip(column);
  else hideTips();
});
document.addEventListener("focusin", (event) => {
  const column = columnOf(event.target);
  if (column) showTip(column);
});
document.addEventListener("focusout", hideTips);
document.addEventListener("keydown", (event) => {
  const column = columnOf(event.target);
  if (!column) return;
  if (event.key === "Escape") hideTips();
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const columns = [...column.parentNode.querySelectorAll(".column")];
  columns[columns.indexOf(column) + steps[event.key]]?.focus();
});
