// A field above each long table, which leaves the rows that hold all words typed into it.
for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
  const rows = [...table.querySelectorAll("tbody tr")];
  if (rows.length < 40) continue;
  const field = document.createElement("input");
  field.type = "search";
  field.className = "table-filter";
  field.placeholder = `Search these ${rows.length} rows`;
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  table.before(field);
}
