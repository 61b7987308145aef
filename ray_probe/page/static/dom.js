/* Small builders of elements. Text goes in as text nodes alone, so that names of checkpoints stay text. */
"use strict";

RayProbe.dom = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const { figure, withError, holm } = RayProbe.format;

  /* An element with attributes and children; null children are left out. */
  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(
      ...children
        .flat()
        .filter((child) => child !== null && child !== undefined)
        .map(unbroken),
    );
    return element;
  }

  /* A value stays on a line with its error, and a share with its sign. */
  const unbroken = (child) =>
    typeof child === "string" ? child.replaceAll(" ± ", "\u00a0±\u00a0").replaceAll(" %", "\u00a0%") : child;

  function svg(tag, attributes, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  let ids = 0;
  const newId = (stem) => `${stem}-${++ids}`;

  /* A section with its heading; `level` is that of the heading. */
  function section(title, level, ...children) {
    const id = newId("title");
    return h("section", { "aria-labelledby": id }, h(`h${level}`, { id }, title), ...children);
  }

  const note = (text) => h("p", { class: "note" }, text);
  const meaning = (name) =>
    h(
      "details",
      { class: "meaning" },
      h("summary", {}, "What this means"),
      RayProbe.meanings[name].map((line) => h("p", {}, line)),
    );

  /* A table that scrolls sideways on a narrow screen. Columns: {title, number?, head?}; rows are lists of text or
   * nodes, or {cells, attributes?, below?}. */
  function table(caption, columns, rows, options = {}) {
    const head = h(
      "tr",
      {},
      columns.map((one) => h("th", { scope: "col", class: one.number ? "number" : null }, one.title)),
    );
    const body = rows.flatMap((row) => [
      h(
        "tr",
        row.attributes ?? {},
        (row.cells ?? row).map((cell, place) => {
          const { number, head: isHead } = columns[place];
          return h(isHead ? "th" : "td", { scope: isHead ? "row" : null, class: number ? "number" : null }, cell);
        }),
      ),
      row.below ? h("tr", {}, h("td", { colspan: columns.length, class: "below" }, row.below)) : null,
    ]);
    const made = h(
      "table",
      { class: options.kind ?? null },
      h("caption", { class: options.hidden ? "hidden" : null }, caption),
      h("thead", {}, head),
      h("tbody", {}, body),
    );
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, made);
  }

  /* The rows [section, name, value, note] that the command line prints, by section; an empty section goes on. */
  function bySection(rows) {
    const groups = new Map();
    let current = null;
    for (const [group, ...row] of rows) {
      current = group || current;
      groups.set(current, [...(groups.get(current) ?? []), row]);
    }
    return groups;
  }

  function figureTable(title, rows) {
    const body = rows.map(([name, value, remark]) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, name, remark ? h("span", { class: "remark" }, remark) : null),
        h("td", { class: "value" }, value),
      ),
    );
    return h("table", { class: "figures" }, h("caption", {}, title), h("tbody", {}, body));
  }

  /* The sections of these names as small tables; null where there is none. */
  function figureTables(rows, names) {
    const groups = bySection(rows),
      found = names.filter((name) => groups.has(name));
    return found.length
      ? h(
          "div",
          { class: "panels" },
          found.map((name) => figureTable(name, groups.get(name))),
        )
      : null;
  }

  /* The room that values with errors take: [low, high], 0 inside. */
  function room(parts) {
    const ends = parts.flatMap(({ value, se }) => [(value ?? 0) - (se ?? 0), (value ?? 0) + (se ?? 0)]);
    const low = Math.min(0, ...ends),
      high = Math.max(0, ...ends);
    return low === high ? [-1, 1] : [low, high];
  }

  function bar({ value, se }, [low, high], kind) {
    const at = (number) => 2 + (96 * (number - low)) / (high - low);
    const zero = svg("line", { class: "zero", x1: at(0), x2: at(0), y1: 0, y2: 20 });
    const drawn = svg("svg", {
      class: "bar",
      viewBox: "0 0 100 20",
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    if (Number.isFinite(value)) {
      const [left, right] = [at(Math.min(0, value)), at(Math.max(0, value))];
      drawn.append(
        svg("rect", {
          class: kind ?? (value < 0 ? "negative" : "positive"),
          x: left,
          y: 3,
          width: right - left,
          height: 14,
        }),
      );
      if (Number.isFinite(se) && se > 0) {
        const [from, to] = [at(value - se), at(value + se)];
        drawn.append(svg("path", { class: "whisker", d: `M${from} 10H${to}M${from} 6V14M${to} 6V14` }));
      }
    }
    drawn.append(zero);
    return drawn;
  }

  /* Values with errors, one row each, with a bar beside the number. Rows: {name, value, se, kind?, remark?}. */
  function barTable(caption, unit, rows, options = {}) {
    const inside = room(rows),
      marks = options.marked ? holm(rows) : rows.map(() => false);
    const remarks = rows.some((row) => row.remark !== undefined);
    const body = rows.map((row, place) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, row.name),
        h(
          "td",
          { class: "number" },
          row.text ?? withError(row.value, row.se, options.signed ?? true),
          marks[place] ? h("b", { class: "star", title: "differs from 0" }, " *") : null,
        ),
        h("td", { class: "drawn" }, bar(row, inside, row.kind)),
        remarks ? h("td", { class: "number remark", "data-unit": options.remark }, row.remark ?? "") : null,
      ),
    );
    const head = h(
      "tr",
      {},
      h("th", { scope: "col" }, options.first ?? ""),
      h("th", { scope: "col", class: "number" }, unit),
      h("th", { scope: "col", class: "drawn" }, h("span", { class: "hidden" }, "drawn")),
      remarks ? h("th", { scope: "col", class: "number" }, options.remark ?? "") : null,
    );
    const made = h("table", { class: "bars" }, h("caption", {}, caption), h("thead", {}, head), h("tbody", {}, body));
    const stars = options.marked
      ? note("* differs from 0: Holm's method, 5 % over all bars. ± and whiskers: one standard error.")
      : note("± and whiskers: one standard error.");
    return h("figure", { class: "plain" }, made, stars);
  }

  function valueOverError(one) {
    const [value, error] = figure(one, true).split(" ± ");
    return error === undefined
      ? [value]
      : [h("span", { class: "above" }, value), h("span", { class: "error" }, `± ${error}`)];
  }

  /* A map of cells with colour, value and error. `cell(row, column)` returns {value, se} or null. */
  function heatMap(caption, corner, rows, columns, cell) {
    const cells = rows.map((_, row) => columns.map((_, column) => cell(row, column)));
    const known = cells.flat().filter((one) => one !== null && Number.isFinite(one.value));
    const most = Math.max(...known.map((one) => Math.abs(one.value)), 0) || 1;
    const marks = new Map(holm(known).map((mark, place) => [known[place], mark]));
    const body = rows.map((name, row) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, name),
        cells[row].map((one) => {
          if (one === null) return h("td", { class: "empty" }, "–");
          const made = h(
            "td",
            { class: one.value < 0 ? "negative" : "positive" },
            ...valueOverError(one),
            marks.get(one) ? h("b", { class: "star", title: "differs from 0" }, " *") : null,
          );
          made.style.setProperty("--share", `${Math.round((62 * Math.abs(one.value ?? 0)) / most)}%`);
          return made;
        }),
      ),
    );
    const head = h(
      "tr",
      {},
      h("th", { scope: "col" }, corner),
      columns.map((name) => h("th", { scope: "col" }, name)),
    );
    const made = h("table", { class: "heat" }, h("caption", {}, caption), h("thead", {}, head), h("tbody", {}, body));
    return h(
      "figure",
      { class: "plain" },
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, made),
      note(
        "* differs from 0: Holm's method, 5 % over all cells. Vermilion: below 0; blue: above 0; ± one standard error.",
      ),
    );
  }

  /* Buttons of which one is pressed. Choices: [[value, label]]; `chosen` is called with the value. */
  function choice(label, choices, current, chosen) {
    const name = newId("choice");
    return h(
      "fieldset",
      { class: "choice" },
      h("legend", { class: "hidden" }, label),
      choices.map(([value, text]) => {
        const id = newId("option");
        return h(
          "span",
          {},
          h("input", { type: "radio", id, name, value, checked: value === current, onchange: () => chosen(value) }),
          h("label", { for: id }, text),
        );
      }),
    );
  }

  return { h, section, note, meaning, table, figureTables, barTable, heatMap, choice };
})();
