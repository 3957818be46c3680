"use strict";

// What is packed into the page: gzip in base64, in a script element that no browser runs.
const unpacked = async element => {
  const bytes = Uint8Array.from(atob(element.textContent), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
};
const all = (selector, of = document) => [...of.querySelectorAll(selector)];
const onClick = (selector, act) => all(selector).forEach(each => each.addEventListener("click", () => act(each)));

// Sorting: up, down, and back to the order in which the page has the rows. What is missing stays last.
const keyOf = cell =>
  cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim() || null;
const compare = (a, b) =>
  typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
const sorted = (rows, column, sign) => {
  const keys = new Map(rows.map(row => [row, keyOf(row.cells[column])]));
  return [...rows].sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    return x === null || y === null ? (x === null) - (y === null) : sign * compare(x, y);
  });
};
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
for (const table of all("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const order = NEXT[head.getAttribute("aria-sort")];
    heads.forEach(each => each.setAttribute("aria-sort", each === head ? order : "none"));
    body.append(...(order === "none" ? rows : sorted(rows, column, order === "ascending" ? 1 : -1)));
  }));
  const filter = table.closest(".table").querySelector("input");
  filter?.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    const left = rows.filter(row => !row.hidden).length;
    filter.closest("p").querySelector("output").textContent = `${left} of ${rows.length}`;
  });
}

// Definitions, to which terms are links: shown while a term, or the definition itself, is pointed at, has the focus, or
// was tapped.
const tip = document.getElementById("tip");
const hide = () => { tip.hidden = true; };
const show = term => {
  tip.textContent = document.getElementById(term.getAttribute("aria-describedby")).textContent;
  tip.hidden = false;
  const at = term.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = at.bottom + size.height <= innerHeight || at.top < size.height;
  tip.style.top = `${below ? at.bottom : at.top - size.height}px`;
  tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - size.width - 8))}px`;
};
const termOf = event => event.target.closest?.("[aria-describedby]");
for (const kind of ["pointerover", "focusin", "click"]) {
  document.addEventListener(kind, event => {
    const term = termOf(event);
    if (term) show(term);
    else if (!tip.contains(event.target)) hide();
    if (kind === "click" && term?.matches("a")) event.preventDefault();
  });
}
document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", hide, { capture: true, passive: true });

// Downloads and copies.
const save = (content, name) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
};
onClick("[data-download]", async button => {
  const packed = document.getElementById(button.dataset.download);
  save(await (await unpacked(packed)).arrayBuffer(), packed.dataset.file);
});
onClick("[data-copy]", async button => {
  const element = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(element.textContent);
    button.textContent = "Copied";
  } catch {  // where pages of files may not: selected, it is one key away
    getSelection().selectAllChildren(element);
    button.textContent = "Selected";
  }
});

// On a narrow screen the contents would push everything else out of sight.
if (matchMedia("(max-width: 640px)").matches) document.querySelector("nav details").open = false;

// No button that leads elsewhere: plotly's own bar has one that sends a figure to its makers' servers.
const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
(async () => {
  const library = document.createElement("script");
  library.textContent = await (await unpacked(document.getElementById("plotly-js"))).text();
  document.head.append(library);
  for (const packed of all("[data-plot]")) {
    const { data, layout } = await (await unpacked(packed)).json();
    const picture = { format: "svg", filename: packed.dataset.file };
    const config = { responsive: true, displaylogo: false, modeBarButtons: BUTTONS, toImageButtonOptions: picture };
    await Plotly.newPlot(packed.dataset.plot, data, layout, config);
    const button = document.querySelector(`[data-picture="${packed.dataset.plot}"]`);
    button.addEventListener("click", () => Plotly.downloadImage(packed.dataset.plot, picture));
  }
})();
