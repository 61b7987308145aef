/* Draws results and reports from data objects; the live page and report.html share it. */
"use strict";

RayProbe.render = (() => {
  const { h, section, note, meaning, table, figureRows, barTable } = RayProbe.dom;
  const F = RayProbe.format;
  const { partsOf, PARTS_MEANING, view, card } = RayProbe.series;
  const MODES = ["none", "constant", "residual_mu", "regression"];
  const NATS = "nats a response";
  const SQUARE = "nats² a token";

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
    const named = (parts, name) => parts.map((part) => ({ name: name(part), value: part.value, se: part.se, remark: F.whole(part.tokens) }));
    const range = (part) => `${part.first} to ${part.last - 1}`;
    const entropy = (part) => (part.first === part.last ? "no choice" : `${F.number(part.first, 2)} to ${F.number(part.last, 2)}`);
    const marked = { marked: true, remark: "tokens" };
    const prompts = change.prompts.map((one) => [one.prompt === null ? "all others" : `prompt ${one.prompt}`, F.whole(one.responses), F.signed(one.value)]);
    return [
      section("Change of entropy", level,
        barTable("From A to B", NATS, [
          { name: "total", ...change.total, kind: "total" },
          { name: "pathwise: at the states visited", ...change.pathwise, kind: "pathwise" },
          { name: "visitation: through which states are visited", ...change.visitation, kind: "visitation" },
        ]),
        meaning("What this means", "Pathwise: at the prefixes that responses go through, B is surer than A (below 0) or less sure (above 0). Visitation: B's responses go through other prefixes than A's, at which the policies are surer (below 0) or less sure (above 0). Both add up to the total, exactly, whatever the distance between A and B.")),
      change.parts.length ? section("Which part of the update did it", level, ...partsOf(change.parts, change.remainder), PARTS_MEANING()) : null,
      section("Where the change is made", level,
        h("div", { class: "panels" },
          barTable("By position of the token", NATS, named(change.positions, range), { ...marked, first: "position" }),
          barTable("By the token's entropy, mean of A and B", NATS, named(change.token_entropy, entropy), { ...marked, first: "nats" })),
        change.prompts.length ? h("details", {}, h("summary", {}, "By prompt: the largest parts each way"), table("Change by prompt", [{ title: "prompt", head: true }, { title: "responses", number: true }, { title: `part of the total, ${NATS}`, number: true }], prompts), note("Parts of one prompt have no error of their own: they are chosen for their size.")) : null),
    ].filter((one) => one !== null);
  }

  function roundsView(rounds, level, drawn) {
    const points = rounds.map(({ round, entropy }) => ({ x: round + 1, label: `round ${round + 1}`, value: entropy?.per_sequence, se: entropy?.per_sequence_se }));
    if (points.filter((point) => !F.isMissing(point.value)).length < 2) return null;
    const host = h("figure", { class: "plain" });
    drawn.push(() => RayProbe.charts.curve(host, { curves: [{ name: "", points }], unit: NATS, xLabel: "round", names: null, sync: null, label: "entropy of each round" }));
    return section("Entropy of each round", level, host, meaning("What this means", "Each round has prompts of its own. Rounds that differ by many errors point to prompts in an order, not to the checkpoint, which is the same in all."));
  }

  function baselineView(result, level) {
    const used = result.config?.estimator?.baseline?.mode;
    const ratio = result.advantage_mean_square_ratio ?? {};
    const rows = MODES.filter((mode) => mode in (result.advantage_mean_square ?? {})).map((mode) => {
      const one = mode === "none" ? { value: 1, se: null } : (ratio[mode] ?? {});
      return { name: mode === used ? `${mode} (in use)` : mode, value: one.value, se: one.se, text: mode === "none" ? "1" : undefined, kind: mode === used ? "total" : "muted", remark: F.withError(result.advantage_mean_square[mode], result.advantage_mean_square_se?.[mode]) };
    });
    if (!rows.length) return null;
    return section("Noise by baseline", level, barTable("Mean squared advantage, ratio to no baseline", "ratio to none", rows, { first: "baseline", signed: false, remark: SQUARE }),
      meaning("What this means", "What the baseline leaves of the noise of the score term. It changes how many responses an error takes, never what is estimated."));
  }

  function betaTable(beta) {
    const rows = beta.features.map((name, place) => [name, F.number(beta.values?.[place] ?? null)]);
    const lines = [
      `R² ${F.number(beta.r2, 3)}, condition number ${F.number(beta.condition_number, 2)}${beta.fallback ? `, fallback ${beta.fallback}` : ""}`,
      `fitted on ${F.count(beta.tokens, "token")} of ${F.count(beta.sequences, "response")}, ${beta.round < 0 ? "before any round" : `through round ${beta.round + 1}`}; ridge_lambda ${F.number(beta.ridge_lambda, 1)}`,
    ];
    return [table(`Beta version ${F.whole(beta.version)}`, [{ title: "feature", head: true }, { title: "nats per unit of the feature", number: true }], rows), ...lines.map(note)];
  }

  /* One result with everything that it says; `entry` is {name, result, words, rounds?}. Returns {node, draw}. */
  function resultView(entry, level) {
    const { result, words, rounds = [] } = entry, drawn = [];
    const node = h("div", { class: "result" },
      h("header", {}, h(`h${level}`, {}, words.title), ...words.lines.map(note), ...judgement(words)),
      ...(result.change ? changeViews(result.change, level + 1) : []),
      section("Figures", level + 1, figureRows(words.rows), meaning("What this means", "± is one standard error for prompts like these, with prompts as clusters. About 95 % of intervals of two errors each way hold the true value. SNR is that of the gradient vector; the entropy and its change are well known long before the vector's direction is.")),
      result.change ? null : roundsView(rounds, level + 1, drawn),
      baselineView(result, level + 1),
      result.beta?.values ? h("details", {}, h("summary", {}, "Beta: the fitted baseline"), ...betaTable(result.beta)) : null,
      h("details", {}, h("summary", {}, "Configuration"), h("pre", { tabindex: "0" }, JSON.stringify(result.config, null, 1))),
    );
    return { node, draw: () => drawn.map((one) => one()) };
  }

  /* The whole report, from the data block of report.html. */
  function report(root, data) {
    const { series, entries } = data;
    root.replaceChildren(h("header", { class: "top" }, h("h1", {}, data.title), note(`ray_probe ${data.version}, ${F.utc(data.created)}`)));
    if (series.length) {
      root.append(section(series.length > 1 ? "Newest checkpoints" : "Newest checkpoint", 2, h("div", { class: "cards" }, series.map((one) => card(one, 3)))));
      view(root, series, 2);
    }
    if (entries.length > 1) root.append(section("Measurements", 2, summaryTable(entries)));
    const one = entries.length === 1 && !series.length;
    for (const entry of entries) {
      const { node, draw } = resultView(entry, one ? 2 : 3);
      if (one) root.append(node), draw();
      else root.append(later(entry, node, draw));
    }
  }

  /* A closed part whose charts are drawn once it is opened: before, it has no width. */
  function later(entry, node, draw) {
    let open = false;
    const opened = () => { if (!open) draw(); open = true; };
    return h("details", { class: "entry", ontoggle: opened }, h("summary", {}, h("b", {}, entry.name), " ", entry.words.verdict), node);
  }

  function summaryTable(entries) {
    const columns = ["measurement", "checkpoint", "responses", "entropy, nats", "nats a token", "change, nats", "SNR"].map((title, place) => ({ title, number: place > 1, head: place === 0 }));
    const rows = entries.map(({ name, result: { config, counts, entropy: e, change, gradient } }) => {
      const entropy = change ? F.figure(change.entropy_b) : F.withError(e.per_sequence, e.per_sequence_se);
      const token = change ? F.figure(change.per_token.b) : F.withError(e.per_token, e.per_token_se);
      const rest = change ? [F.figure(change.total, true), ""] : ["", F.number(gradient.snr, 3)];
      return [name, checkpointName(config), F.whole(counts.sequences), entropy, token, ...rest];
    });
    return [table("All measurements", columns, rows), note("± one standard error, prompts as clusters. Of a comparison: the entropy at B.")];
  }

  function checkpointName(config) {
    const path = config?.model?.path ?? "a checkpoint", against = config?.compare?.against;
    return h("span", { title: path }, `${lastParts(path)}${against ? ` against ${lastParts(against)}` : ""}`);
  }

  const lastParts = (path) => String(path).split("/").filter(Boolean).slice(-2).join("/");

  return { report, resultView, betaTable, judgement, summaryTable, lastParts, MODES, SQUARE, NATS };
})();
