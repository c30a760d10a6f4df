// A button beside every table, and beside the commands, that copies it: tab-separated, as spreadsheets take it.
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
    button.textContent = copied(text) ? "Copied" : "Not allowed";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
});

// A file opened from a disk may not use the clipboard's own interface: a selection does.
function copied(text) {
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
