/* Which part of an update changed the entropy: maps of layers, bars for other groups. */
"use strict";

RayProbe.parts = (() => {
  const { h, section, meaning, barTable, heatMap } = RayProbe.dom;
  const LAYER = /^layer (\d+) (.+)$/;
  const NATS = "nats a response";

  /* Layers by kinds at one step, or layers by steps for one kind. */
  function partsSection(measured, level, state) {
    if (!measured.length) return null;
    const kinds = [
      ...new Set(
        measured.flatMap(({ change }) => change.parts.flatMap(({ group }) => LAYER.exec(group)?.slice(2) ?? [])),
      ),
    ];
    const host = h("div", {});
    const show = (value) => {
      state.parts = value;
      const kind = value.startsWith("kind ") ? value.slice(5) : null;
      if (kind !== null) host.replaceChildren(byStep(measured, kind));
      else host.replaceChildren(...partsOf(measured[Number(value.slice(5))].change.parts, null));
    };
    const options = [
      ...measured.map(({ name }, place) => [`step ${place}`, name]),
      ...(measured.length > 1 ? kinds.map((kind) => [`kind ${kind}`, `${kind}, all steps`]) : []),
    ];
    const current = options.some(([value]) => value === state.parts) ? state.parts : options[measured.length - 1][0];
    const picker =
      options.length < 2
        ? null
        : h(
            "label",
            { class: "picker" },
            "Show ",
            h(
              "select",
              { onchange: (event) => show(event.target.value) },
              options.map(([value, text]) => h("option", { value, selected: value === current }, text)),
            ),
          );
    show(current);
    return section("Which part of the update did it", level, picker, host, meaning("parts"));
  }

  function byStep(measured, kind) {
    const layers = layersOf(measured.flatMap(({ change }) => change.parts));
    const cell = (row, column) =>
      measured[column].change.parts.find(({ group }) => group === `layer ${layers[row]} ${kind}`) ?? null;
    return heatMap(
      `Change by layer and step, ${kind}, ${NATS}`,
      "layer",
      layers.map(String),
      measured.map(({ name }) => name),
      cell,
    );
  }

  const layersOf = (parts) =>
    [...new Set(parts.flatMap(({ group }) => LAYER.exec(group)?.slice(1, 2) ?? []).map(Number))].sort((a, b) => a - b);

  /* The parts of one change: a map of layers and kinds, bars for the other groups and the remainder. */
  function partsOf(parts, remainder) {
    const layers = layersOf(parts),
      kinds = [...new Set(parts.flatMap(({ group }) => LAYER.exec(group)?.slice(2) ?? []))];
    const cell = (row, column) => parts.find(({ group }) => group === `layer ${layers[row]} ${kinds[column]}`) ?? null;
    const others = parts
      .filter(({ group }) => !LAYER.test(group))
      .map(({ group, value, se }) => ({ name: group, value, se }));
    if (remainder !== null) others.push({ name: "remainder", ...remainder });
    return [
      layers.length ? heatMap(`Change by layer and kind, ${NATS}`, "layer", layers.map(String), kinds, cell) : null,
      others.length ? barTable("Change by other parts", NATS, others, { first: "part" }) : null,
    ].filter((one) => one !== null);
  }

  return { partsSection, partsOf };
})();
