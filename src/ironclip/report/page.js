"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];

  // Sorting: a button in each heading; missing values stay last; equal values keep their order.
  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const numeric = head.classList.contains("num");
      const first = numeric ? "descending" : "ascending";
      const next = head.getAttribute("aria-sort") === first ? (numeric ? "ascending" : "descending") : first;
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      body.append(...rows.map(([, row]) => row));
    }));
  }

  // Filters: an element stays if every attribute it has agrees with the choice. The mean over sets is a set of its own
  // for tables and charts (data-own) and stands for all sets elsewhere.
  const form = document.getElementById("filters");
  const selects = all("select[data-key]");
  const apply = () => {
    for (const element of all("[data-f]")) {
      element.hidden = selects.some((select) => {
        const key = select.dataset.key, want = select.value, have = element.getAttribute(`data-${key}`);
        if (!want || !have) return false;
        if (key === "set" && want.startsWith("mean of ") && !element.hasAttribute("data-own")) return false;
        return want !== have;
      });
    }
    for (const cell of all("[data-col]")) {
      cell.hidden = selects.some((select) => select.dataset.key === cell.dataset.col && select.value);
    }
    for (const section of all("[data-empty]")) {
      const shown = all(section.dataset.empty, section).some((element) => !element.hidden);
      section.querySelector(".nothing").hidden = shown;
    }
    draw();
  };
  selects.forEach((select) => select.addEventListener("change", apply));
  form?.addEventListener("reset", () => setTimeout(apply));

  // Gallery: every picture is in the page once, under its content's name.
  const images = JSON.parse(document.getElementById("images").textContent);
  const show = (card, view) => {
    const buttons = all("button[data-view]", card);
    if (!buttons.some((b) => b.dataset.view === view)) view = buttons[0]?.dataset.view;
    for (const button of buttons) {
      const on = button.dataset.view === view;
      button.setAttribute("aria-pressed", String(on));
      if (!on) continue;
      const picture = card.querySelector("img");
      picture.src = `data:image/png;base64,${images[button.dataset.image]}`;
      picture.alt = `${button.textContent.trim()} image: ${card.dataset.label}`;
    }
  };
  for (const card of all(".card")) {
    show(card, "clean");
    card.addEventListener("click", (event) => {
      if (event.target.dataset.view) show(card, event.target.dataset.view);
    });
  }
  for (const button of all("[data-every]")) {
    button.addEventListener("click", () => {
      all("[data-every]").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      all(".card").forEach((card) => show(card, button.dataset.every));
    });
  }

  // Charts: drawn when first visible, again when the colours of the page change.
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const text = { labelColor: color("--soft"), titleColor: color("--soft"), titleFontWeight: "normal" };
    return {
      background: "transparent", font: getComputedStyle(document.body).fontFamily, view: { stroke: null },
      axis: { ...text, gridColor: color("--line"), domainColor: color("--line"), tickColor: color("--line") },
      legend: {
        ...text, orient: "bottom", columns: innerWidth < 640 ? 2 : 4, labelLimit: 150,
        layout: { bottom: { anchor: "start", direction: "vertical" } },
      },
      text: { color: color("--ink"), fill: color("--ink") },
    };
  };
  const draw = (again = false) => {
    if (!window.vegaEmbed) return;
    for (const place of all(".chart")) {
      if (!place.offsetParent || (place.dataset.drawn && !again)) continue;
      place.dataset.drawn = "1";
      const options = { ast: true, renderer: "svg", config: theme(), actions: { export: true, source: false, compiled: false, editor: false } };
      vegaEmbed(place, specs[place.dataset.spec], options).catch((error) => {
        place.textContent = `chart not drawn: ${error.message}`;
        console.error(error);
      });
    }
  };
  dark.addEventListener("change", () => draw(true));
  apply();
})();
