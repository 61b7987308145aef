/* The view of series: headline, curve, changes, map of the update's parts, table. */
"use strict";

RayProbe.series = (() => {
  const { h, section, note, meaning, table, choice } = RayProbe.dom;
  const F = RayProbe.format;
  const { curve, swatch } = RayProbe.charts;
  const { changes: changeChart, rangeOf } = RayProbe.changeBars;
  const { partsSection } = RayProbe.parts;
  const NATS = "nats a response";
  const SYNC = "ray-probe-steps";
  const METRICS = {
    entropy: { label: "entropy a response", unit: NATS, of: (p) => p.entropy },
    per_token: { label: "entropy a token", unit: "nats a token", of: (p) => p.per_token },
    length: { label: "length", unit: "tokens a response", of: (p) => p.length },
    truncated: { label: "cut at the cap", unit: "share of responses", of: (p) => ({ value: p.truncated, se: null }) },
    snr: { label: "SNR of the gradient", unit: "signal over noise", of: (p) => ({ value: p.snr, se: null }) },
  };

  const names = (one) => F.namesOf(one.points.map((point) => point.checkpoint));
  const known = (point) => !F.isMissing(point.step);
  const pointName = (one, place) => (known(one.points[place]) ? `step ${one.points[place].step}` : names(one)[place]);

  /* The places of a change's two checkpoints among the points, neighbours first; null where they are unknown. */
  function ends(one, place) {
    const { first_step: from, first_checkpoint: a, last_step: to, last_checkpoint: b } = one.changes[place];
    const same = (point, step, checkpoint) =>
      F.isMissing(step) ? point?.checkpoint === checkpoint : point?.step === step;
    if (same(one.points[place], from, a) && same(one.points[place + 1], to, b)) return [place, place + 1];
    const found = [
      one.points.findIndex((point) => same(point, from, a)),
      one.points.findIndex((point) => same(point, to, b)),
    ];
    return found.every((index) => index >= 0) ? found : null;
  }

  /* Where points lie on the x axis: on steps, or one after the other where one of them has none.
   *
   * Several series share the steps; a point without one is then in the table alone.
   */
  function placed(list) {
    const all = list.every((one) => one.points.every(known));
    if (all || (list.length > 1 && list.every((one) => one.points.filter(known).length > 1))) {
      const lost = list.flatMap((one) => one.points).filter((point) => !known(point)).length;
      const note = lost ? `${F.count(lost, "checkpoint")} without a step: see all figures below` : null;
      return { x: (one, place) => one.points[place].step ?? null, axis: null, xLabel: "step of the trainer", note };
    }
    const longest = list.reduce((best, one) => (one.points.length > best.points.length ? one : best), list[0]);
    const axis = longest.points.map((_, place) => (list.length === 1 ? pointName(longest, place) : String(place + 1)));
    return { x: (_, place) => place, axis, xLabel: "checkpoints in order", note: null };
  }

  const changeName = (one, place) => {
    const found = ends(one, place);
    if (found !== null) return `${pointName(one, found[0])} to ${pointName(one, found[1])}`;
    const change = one.changes[place];
    return `step ${change.first_step ?? F.NOT_AVAILABLE} to step ${change.last_step ?? F.NOT_AVAILABLE}`;
  };

  /* What a series says in one card: the newest entropy, its last change, what is wrong and what to do. */
  function card(one, level) {
    const known = one.points.flatMap((point, place) => (F.isMissing(point.entropy.value) ? [] : [place]));
    const last = known.at(-1),
      point = one.points[last];
    const change = one.changes.at(-1);
    const body = [h(`h${level}`, {}, one.name || "series")];
    if (point === undefined) body.push(h("p", {}, "no checkpoint of it is measured yet"));
    else
      body.push(
        h("p", { class: "big" }, h("b", {}, F.figure(point.entropy)), ` ${NATS}`),
        h("p", { class: "big second" }, h("b", {}, F.figure(point.per_token)), " nats a token"),
        h("p", { class: "where" }, `at ${pointName(one, last)}, ${F.count(point.responses, "response")}`),
      );
    if (change !== undefined) {
      body.push(
        h(
          "p",
          { class: `verdict ${direction(change.total)}` },
          h("b", {}, `${changeName(one, one.changes.length - 1)}: `),
          F.changeText(change),
          ".",
        ),
      );
      if (!F.isMissing(change.since_first.value))
        body.push(h("p", {}, `Since the first checkpoint: ${F.figure(change.since_first, true)} ${NATS}.`));
    }
    const caveats = [
      ...(change === undefined ? [] : F.changeCaveats(change)),
      ...(point === undefined ? [] : F.pointCaveats(point)),
    ];
    const advice = change === undefined ? null : F.changeAdvice(change);
    body.push(...caveats.map((text) => h("p", { class: "warning" }, text)));
    if (advice !== null) body.push(h("p", {}, h("b", {}, "To do: "), advice));
    const open = [
      one.open ? `${one.open} queued or running` : null,
      one.failed ? `${one.failed} failed or cancelled` : null,
    ].filter(Boolean);
    if (open.length) body.push(note(`measurements: ${open.join(", ")}`));
    return h("article", { class: "card" }, body);
  }

  const direction = (total) => (!F.isSeen(total) ? "same" : total.value < 0 ? "down" : "up");

  function curves(host, list, metric, sync) {
    const { x, axis, xLabel, note: lost } = placed(list);
    const { label, unit, of } = METRICS[metric];
    const drawn = list.map((one) => ({
      name: one.name,
      points: one.points
        .map((point, place) => ({ x: x(one, place), label: pointName(one, place), ...of(point) }))
        .filter((point) => point.x !== null),
    }));
    if (lost !== null) host.append(note(lost));
    if (!drawn.some((one) => one.points.some((point) => !F.isMissing(point.value)))) {
      host.append(note(`${label}: not measured in these series`));
      return () => {};
    }
    if (list.length > 1)
      host.append(
        h(
          "p",
          { class: "legend" },
          list.map((one, place) => h("span", {}, swatch(place), one.name)),
        ),
      );
    return curve(host, { curves: drawn, unit, xLabel, names: axis, sync, label: `${label} by ${xLabel}` });
  }

  function stacked(list) {
    const { x, axis, xLabel } = placed(list);
    return list.map((one) => {
      const found = one.changes.flatMap((change, place) => {
        const at = ends(one, place);
        if (at === null || F.isMissing(change.total.value)) return [];
        const [from, to] = at.map((index) => x(one, index)).sort((a, b) => a - b);
        return from === null || to === null ? [] : [{ ...change, from, to, label: changeName(one, place) }];
      });
      found.sort((a, b) => a.to - b.to || a.from - b.from);
      return { name: one.name, found, axis, xLabel };
    });
  }

  function changeSection(list, level, drawn) {
    const panels = stacked(list).filter((panel) => panel.found.length);
    const range = rangeOf(panels.flatMap((panel) => panel.found));
    const grid = h(
      "div",
      { class: "panels" },
      panels.map((panel) => {
        const host = h("figure", { class: "plain" }, list.length > 1 ? h("figcaption", {}, panel.name) : null);
        const { found, axis, xLabel } = panel;
        drawn.push(() =>
          changeChart(host, {
            changes: found,
            unit: NATS,
            xLabel,
            names: axis,
            sync: SYNC,
            range,
            label: `change of entropy by ${xLabel}, ${panel.name}`,
          }),
        );
        return host;
      }),
    );
    if (!panels.length) return null;
    const key = (kind, text) => h("span", {}, h("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), text);
    return section(
      "Change from checkpoint to checkpoint",
      level,
      h(
        "p",
        { class: "legend" },
        key("pathwise", "pathwise: at the states visited"),
        key("visitation", "visitation: through which states are visited"),
        key("total", "total; whiskers: ± one standard error"),
      ),
      grid,
      meaning("changes"),
    );
  }

  /* The changes whose parts were measured, with a name each. */
  function measuredParts(list) {
    return list.flatMap((one) =>
      one.changes.flatMap((change, place) =>
        change.parts.length
          ? [{ name: `${list.length > 1 ? `${one.name}, ` : ""}${changeName(one, place)}`, change, one }]
          : [],
      ),
    );
  }

  function seriesTable(one) {
    const into = new Map(one.changes.map((change, place) => [ends(one, place)?.[1], change]));
    const columns = [
      "checkpoint",
      "responses",
      "entropy, nats",
      "nats a token",
      "change, nats",
      "pathwise",
      "visitation",
      "since the first",
      "length, tokens",
      "cut at cap",
      "SNR",
      "tags",
    ].map((title, place) => ({ title, number: place > 0 && place < 11, head: place === 0 }));
    const rows = one.points.map((point, place) => {
      const change = into.get(place);
      const changed = ["total", "pathwise", "visitation", "since_first"].map((key) =>
        change === undefined ? "" : F.figure(change[key], true),
      );
      const tags = Object.entries(point.tags)
        .map(([key, value]) => `${key}=${value}`)
        .join(", ");
      return [
        h("span", { title: point.checkpoint }, pointName(one, place)),
        F.whole(point.responses),
        F.figure(point.entropy),
        F.figure(point.per_token),
        ...changed,
        F.figure(point.length),
        F.percent(point.truncated),
        F.number(point.snr, 3),
        tags,
      ];
    });
    return h(
      "details",
      {},
      h("summary", {}, `All figures of ${one.name || "the series"}`),
      table(`Series ${one.name}`, columns, rows),
      note(
        "± one standard error, prompts as clusters; errors of sums come from the sums of each prompt over the steps.",
      ),
    );
  }

  /* Draw series into `host`; returns a function that removes the charts. `state` keeps choices between calls. */
  function view(host, list, level, state = {}) {
    const drawn = [],
      ends = [];
    const figureHost = h("figure", { class: "plain" });
    let remove = () => {};
    const showCurve = (metric) => {
      remove();
      state.metric = metric;
      figureHost.replaceChildren();
      remove = curves(figureHost, list, metric, SYNC);
    };
    const metric = state.metric ?? "entropy";
    host.append(
      section(
        "Entropy along the training run",
        level,
        choice(
          "Figure of the curve",
          Object.entries(METRICS).map(([key, { label }]) => [key, label]),
          metric,
          showCurve,
        ),
        figureHost,
        meaning("curve"),
      ),
      ...[changeSection(list, level, drawn), partsSection(measuredParts(list), level, state)].filter(
        (one) => one !== null,
      ),
      ...list.map(seriesTable),
    );
    showCurve(metric);
    ends.push(...drawn.map((draw) => draw()));
    return () => [remove, ...ends].forEach((end) => end());
  }

  return { view, card };
})();
