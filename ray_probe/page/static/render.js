/* Draws results and reports from data objects; the live page and report.html share it. */
"use strict";

RayProbe.render = (() => {
  const { h, section, note, meaning, table, figureTables, barTable } = RayProbe.dom;
  const F = RayProbe.format;
  const { partsOf } = RayProbe.parts;
  const { view, card } = RayProbe.series;
  const { baselineView, betaTable } = RayProbe.baseline;
  const NATS = "nats a response";

  /* Verdict, warnings and what to do, as the command line says them. */
  function judgement(words) {
    const todo = words.advice ?? (words.caveats.length ? "see the warnings" : "nothing");
    return [
      h("p", { class: "verdict" }, words.verdict, "."),
      ...words.caveats.map((text) => h("p", { class: "warning" }, text)),
      h("p", {}, h("b", {}, "To do: "), todo),
    ];
  }

  function changeViews(change, level) {
    const named = (parts, name) =>
      parts.map((part) => ({ name: name(part), value: part.value, se: part.se, remark: F.whole(part.tokens) }));
    const range = (part) => `${part.first} to ${part.last - 1}`;
    const entropy = (part) =>
      part.first === part.last ? "no choice" : `${F.number(part.first, 2)} to ${F.number(part.last, 2)}`;
    const marked = { marked: true, remark: "tokens" };
    const prompts = change.prompts.map((one) => [
      one.prompt === null ? "all others" : `prompt ${one.prompt}`,
      F.whole(one.responses),
      F.signed(one.value),
    ]);
    return [
      section(
        "Change of entropy",
        level,
        barTable("From A to B", NATS, [
          { name: "total", ...change.total, kind: "total" },
          { name: "pathwise: at the states visited", ...change.pathwise, kind: "pathwise" },
          { name: "visitation: through which states are visited", ...change.visitation, kind: "visitation" },
        ]),
        meaning("change"),
      ),
      change.parts.length
        ? section(
            "Which part of the update did it",
            level,
            ...partsOf(change.parts, change.remainder),
            meaning("parts"),
          )
        : null,
      section(
        "Where the change is made",
        level,
        h(
          "div",
          { class: "panels" },
          barTable("By position of the token", NATS, named(change.positions, range), { ...marked, first: "position" }),
          barTable("By the token's entropy, mean of A and B", NATS, named(change.token_entropy, entropy), {
            ...marked,
            first: "nats",
          }),
        ),
        change.prompts.length
          ? h(
              "details",
              {},
              h("summary", {}, "By prompt: the largest parts each way"),
              table(
                "Change by prompt",
                [
                  { title: "prompt", head: true },
                  { title: "responses", number: true },
                  { title: `part of the total, ${NATS}`, number: true },
                ],
                prompts,
              ),
              note("Parts of one prompt have no error of their own: they are chosen for their size."),
            )
          : null,
      ),
    ].filter((one) => one !== null);
  }

  function roundsView(rounds, level, drawn) {
    const points = rounds.map(({ round, entropy }) => ({
      x: round + 1,
      label: `round ${round + 1}`,
      value: entropy?.per_sequence,
      se: entropy?.per_sequence_se,
    }));
    if (points.filter((point) => !F.isMissing(point.value)).length < 2) return null;
    const host = h("figure", { class: "plain" });
    drawn.push(() =>
      RayProbe.charts.curve(host, {
        curves: [{ name: "", points }],
        unit: NATS,
        xLabel: "round",
        names: null,
        sync: null,
        label: "entropy of each round",
      }),
    );
    return section("Entropy of each round", level, host, meaning("rounds"));
  }

  /* The entropy, or its change, in large letters. */
  function biggest({ change, entropy }) {
    const big = (kind, text, unit) => h("p", { class: kind }, h("b", {}, text), ` ${unit}`);
    if (change) {
      return [
        big("big", F.figure(change.total, true), `${NATS}: change of entropy`),
        big("big second", F.figure(change.per_token.change, true), "nats a token"),
      ];
    }
    return [
      big("big", F.withError(entropy.per_sequence, entropy.per_sequence_se), `${NATS}: entropy`),
      big("big second", F.withError(entropy.per_token, entropy.per_token_se), "nats a token"),
    ];
  }

  function vectorView(rows, level) {
    const tables = figureTables(rows, ["Gradient"]);
    if (tables === null) return null;
    return section("Gradient vector", level, tables, meaning("vector"));
  }

  /* One result with everything that it says; `entry` is {name, result, words, rounds?}. Returns {node, draw}. */
  function resultView(entry, level) {
    const { result, words, rounds = [] } = entry,
      drawn = [];
    const node = h(
      "div",
      { class: "result" },
      h(
        "header",
        {},
        h(`h${level}`, {}, words.title),
        ...words.lines.map(note),
        ...biggest(result),
        ...judgement(words),
      ),
      ...(result.change ? changeViews(result.change, level + 1) : []),
      section(
        "Figures",
        level + 1,
        figureTables(words.rows, ["Entropy", "Change", "Tokens", "Length", "Distance"]),
        meaning("figures"),
      ),
      result.change ? null : roundsView(rounds, level + 1, drawn),
      vectorView(words.rows, level + 1),
      baselineView(entry, level + 1),
      h(
        "details",
        {},
        h("summary", {}, "Parity, counts and times"),
        figureTables(words.rows, ["Parity", "Counts", "Time"]),
      ),
      result.beta?.values
        ? h("details", {}, h("summary", {}, "Beta: the fitted baseline"), ...betaTable(result.beta))
        : null,
      h(
        "details",
        {},
        h("summary", {}, "Configuration"),
        h("pre", { tabindex: "0" }, JSON.stringify(result.config, null, 1)),
      ),
    );
    return { node, draw: () => drawn.map((one) => one()) };
  }

  /* The whole report, from the data block of report.html. */
  function report(root, data) {
    const { series, entries } = data;
    root.replaceChildren(
      h("header", { class: "top" }, h("h1", {}, data.title), note(`ray_probe ${data.version}, ${F.utc(data.created)}`)),
    );
    if (series.length) {
      root.append(
        section(
          series.length > 1 ? "Newest checkpoints" : "Newest checkpoint",
          2,
          h(
            "div",
            { class: "cards" },
            series.map((one) => card(one, 3)),
          ),
        ),
      );
      view(root, series, 2);
    }
    if (entries.length > 1) root.append(section("Measurements", 2, summaryTable(entries)));
    const one = entries.length === 1 && !series.length;
    for (const entry of entries) {
      const { node, draw } = resultView(entry, one ? 2 : 3);
      if (one) (root.append(node), draw());
      else root.append(later(entry, node, draw));
    }
  }

  /* A closed part whose charts are drawn once it is opened: before, it has no width. */
  function later(entry, node, draw) {
    let open = false;
    const opened = () => {
      if (!open) draw();
      open = true;
    };
    return h(
      "details",
      { class: "entry", ontoggle: opened },
      h("summary", {}, h("b", {}, entry.name), " ", entry.words.verdict),
      node,
    );
  }

  function summaryTable(entries) {
    const columns = [
      "measurement",
      "checkpoint",
      "responses",
      "entropy, nats",
      "nats a token",
      "change, nats",
      "SNR",
    ].map((title, place) => ({ title, number: place > 1, head: place === 0 }));
    const rows = entries.map(({ name, result: { config, counts, entropy: e, change, gradient } }) => {
      const entropy = change ? F.figure(change.entropy_b) : F.withError(e.per_sequence, e.per_sequence_se);
      const token = change ? F.figure(change.per_token.b) : F.withError(e.per_token, e.per_token_se);
      const rest = change ? [F.figure(change.total, true), ""] : ["", F.number(gradient.snr, 3)];
      return [name, checkpointName(config), F.whole(counts.sequences), entropy, token, ...rest];
    });
    return [
      table("All measurements", columns, rows),
      note("± one standard error, prompts as clusters. Of a comparison: the entropy at B."),
    ];
  }

  function checkpointName(config) {
    const path = config?.model?.path ?? "a checkpoint",
      against = config?.compare?.against;
    return h("span", { title: path }, `${F.lastParts(path)}${against ? ` against ${F.lastParts(against)}` : ""}`);
  }

  return { report, resultView };
})();
