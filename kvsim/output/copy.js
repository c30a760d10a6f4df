// A button beside every table, and beside the command, that copies it: tab-separated, as spreadsheets take it.
"use strict";
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  event.preventDefault();
  const table = button.closest(".data")?.querySelector("table");
  const text = table
    ? [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent).join("\t")).join("\n")
    : button.closest(".command").querySelector("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch (error) {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
