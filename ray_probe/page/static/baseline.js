/* The baseline: the noise that each mode leaves, and the fitted coefficients. */
"use strict";

RayProbe.baseline = (() => {
  const { h, section, note, meaning, table, barTable, figureTables } = RayProbe.dom;
  const F = RayProbe.format;
  const MODES = ["none", "constant", "residual_mu", "regression"];
  const SQUARE = "nats² a token";

  /* Of a result. */
  function baselineView({ result, words }, level) {
    const used = result.config?.estimator?.baseline?.mode;
    const ratio = result.advantage_mean_square_ratio ?? {};
    const rows = MODES.filter((mode) => mode in (result.advantage_mean_square ?? {})).map((mode) => {
      const one = mode === "none" ? { value: 1, se: null } : (ratio[mode] ?? {});
      return {
        name: mode === used ? `${mode} (in use)` : mode,
        value: one.value,
        se: one.se,
        text: mode === "none" ? "1" : undefined,
        kind: mode === used ? "total" : "muted",
        remark: F.withError(result.advantage_mean_square[mode], result.advantage_mean_square_se?.[mode]),
      };
    });
    if (!rows.length) return null;
    return section(
      "Noise by baseline",
      level,
      barTable("Mean squared advantage, ratio to no baseline", "ratio to none", rows, {
        first: "baseline",
        signed: false,
        remark: SQUARE,
      }),
      figureTables(words.rows, ["Baseline", "Paired"]),
      meaning("baseline"),
    );
  }

  function betaTable(beta) {
    const rows = beta.features.map((name, place) => [name, F.number(beta.values?.[place] ?? null)]);
    const fallback = beta.fallback ? [`fallback ${beta.fallback}`] : [];
    const through = beta.round < 0 ? "before any round" : `through round ${beta.round + 1}`;
    const lines = [
      [`R² ${F.number(beta.r2, 3)}`, `condition number ${F.number(beta.condition_number, 2)}`, ...fallback].join(", "),
      `fitted on ${F.count(beta.tokens, "token")} of ${F.count(beta.sequences, "response")}, ${through}; ` +
        `ridge_lambda ${F.number(beta.ridge_lambda, 1)}`,
    ];
    return [
      table(
        `Beta version ${F.whole(beta.version)}`,
        [
          { title: "feature", head: true },
          { title: "nats per unit of the feature", number: true },
        ],
        rows,
      ),
      ...lines.map(note),
    ];
  }

  /* Beta and variance of a measurement; a string in the place of one says why it is missing. */
  function noise(beta, variance) {
    const parts = [typeof beta === "string" ? note(`Beta: ${beta}`) : h("div", {}, betaTable(beta))];
    if (typeof variance === "string") parts.unshift(note(`Variance: ${variance}`));
    else parts.unshift(varianceTable(variance));
    const of = [beta, variance].find((one) => typeof one !== "string")?.measurement;
    return section(`Noise and baseline${of ? ` of ${of}` : ""}`, 2, h("div", { class: "panels" }, parts));
  }

  function varianceTable(variance) {
    if (!variance.rounds) return note("Variance: no whole round yet; estimates come with the first.");
    const ratios = variance.advantage_mean_square_ratio ?? {},
      square = variance.advantage_mean_square ?? {};
    const rows = MODES.map((mode) => ({
      name: mode === variance.mode ? `${mode} (in use)` : mode,
      kind: mode === variance.mode ? "total" : "muted",
      value: mode === "none" ? 1 : ratios[mode]?.value,
      se: mode === "none" ? null : ratios[mode]?.se,
      text: mode === "none" ? "1" : undefined,
      remark: F.number(square[mode]),
    }));
    const snr = variance.gradient?.snr;
    return h(
      "div",
      {},
      barTable("Mean squared advantage by baseline, ratio to no baseline", "ratio to none", rows, {
        first: "baseline",
        signed: false,
        remark: SQUARE,
      }),
      note(
        `${F.count(variance.rounds, "whole round")}, ${F.whole(variance.sequences)} responses; ` +
          `beta version ${F.whole(variance.beta_version)}; SNR of the gradient vector ${F.number(snr, 3)}`,
      ),
    );
  }

  return { baselineView, betaTable, noise };
})();
