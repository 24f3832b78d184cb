"use strict";
// Sorting: by data-v where a cell has a number, else by its text. Empty cells stay last.
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const falling = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.children[column], number = cell.dataset.v;
      return number === undefined ? cell.textContent.trim() : Number(number);
    };
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
      return falling ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  });
}
// Filtering of the answers that changed.
const form = document.getElementById("filter");
if (form) {
  const changes = [...document.querySelectorAll("article.change")];
  const filter = () => {
    const text = form.elements.text.value.toLowerCase();
    let left = 0;
    for (const change of changes) {
      const fits = ["run", "task", "kind"].every((key) => !form.elements[key].value || change.dataset[key] === form.elements[key].value);
      change.hidden = !(fits && (!text || change.textContent.toLowerCase().includes(text)));
      left += !change.hidden;
    }
    document.getElementById("count").textContent = `${left} of ${changes.length}`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
}
// What is folded is printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
