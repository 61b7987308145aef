/* Draws the state of a service: the running measurement, actors, what is wrong, all measurements. */
"use strict";

RayProbe.service = (() => {
  const { h, section, note, table, barTable } = RayProbe.dom;
  const F = RayProbe.format;
  const { betaTable, lastParts, MODES, SQUARE, NATS } = RayProbe.render;
  const LISTED = 8;
  const RATE_S = 20;
  const STATES = { idle: "good", measuring: "busy", loading: "busy", starting: "busy", failed: "bad", closing: "bad" };

  function top(status, live) {
    const state = status.draining ? `${status.state}, draining` : status.state;
    return [
      h("div", { class: "bar-top" }, h("h1", {}, `${status.kind} ${status.name}`), h("span", { class: `state ${STATES[status.state] ?? ""}` }, state),
        h("span", { class: "note" }, live ? "live" : "not connected")),
      note(`since ${F.utc(status.since)}; files in ${status.directory}`),
    ];
  }

  const checkpointOf = (info) => [lastParts(info.checkpoint), info.adapter ? ` + ${lastParts(info.adapter)}` : "", info.against ? ` against ${lastParts(info.against)}` : ""].join("");
  const placeOf = (info) => [info.series ? `series ${info.series}` : null, F.isMissing(info.step) ? null : `step ${info.step}`, ...Object.entries(info.tags ?? {}).map(([key, value]) => `${key}=${value}`)].filter(Boolean).join(", ");

  /* The newest figures of a service without a series. */
  function card(info) {
    const { entropy, change } = info;
    return h("article", { class: "card" }, h("h3", {}, `${info.id}: ${checkpointOf(info)}`),
      change ? h("p", { class: "big" }, h("b", {}, F.figure(change, true)), ` ${NATS}, change`) : null,
      h("p", { class: change ? "big second" : "big" }, h("b", {}, F.withError(entropy.per_sequence, entropy.per_sequence_se)), ` ${NATS}${change ? ", both checkpoints" : ""}`),
      h("p", { class: "big second" }, h("b", {}, F.withError(entropy.per_token, entropy.per_token_se)), " nats a token"),
      h("p", { class: "where" }, `${F.count(info.sequences, "response")}, ${info.state}`));
  }

  /* Share of the run's shards that are done; null where a budget ends it. */
  const doneOf = (p) => (p.rounds ? (p.round + (p.shards ? (p.collected + p.accumulated) / (2 * p.shards) : 0)) / p.rounds : null);

  /* Seconds until the last round; null while it is unknown. A resumed run's speed is that of the time watched. */
  function remaining(progress, first) {
    const done = doneOf(progress);
    if (done === null || done <= 0 || progress.elapsed_s <= 0) return null;
    const watched = first !== null && progress.elapsed_s - first.elapsed_s >= RATE_S;
    const speed = watched ? (done - doneOf(first)) / (progress.elapsed_s - first.elapsed_s) : done / progress.elapsed_s;
    return speed > 0 ? (1 - done) / speed : null;
  }

  function progressRows(progress, first) {
    const { round, rounds, shards, collected, accumulated, tokens, elapsed_s: elapsed } = progress;
    const left = remaining(progress, first);
    return [
      ["Round", rounds === null ? `${round + 1}, until a budget ends it` : `${round + 1} of ${rounds}`],
      ["Shards of this round", `${collected} of ${shards} sampled, ${accumulated} of ${shards} finished`],
      ["Rate", elapsed > 0 ? `${F.number(tokens / elapsed, 3)} tokens/s` : "not yet known"],
      ["Time left", rounds === null ? "not known: a budget ends it" : left === null ? "not yet known" : `about ${F.duration(Math.max(1, left))}`],
      ["Sampled", `${F.whole(tokens)} tokens in ${F.duration(elapsed)}`],
      ["Beta", progress.version ? `version ${progress.version}` : "none yet"],
      ["Noise left by the baseline", `${F.number(progress.variance_ratio, 3)}, mean square to that of none, so far`],
    ];
  }

  function running(status, first) {
    const { measurement: info, progress, queued } = status;
    const waiting = queued.length ? `Queue: ${queued.length} waiting, ${queued.slice(0, LISTED).join(", ")}${queued.length > LISTED ? ` and ${queued.length - LISTED} more` : ""}.` : "Queue: nothing waits.";
    if (info === null) return section("Running", 2, h("p", {}, "No measurement runs. ", waiting, ` ${F.count(status.ended, "measurement")} ended.`));
    const done = progress === null || progress.rounds === 0 ? null : doneOf(progress);
    const bar = progress === null ? null : h("progress", { "aria-label": "progress of the measurement", max: "1", value: done });
    const list = progress === null || progress.rounds === 0 ? [["Round", "before its first shard"]] : progressRows(progress, first);
    const found = [];
    if (info.change) found.push(["Change so far", `${F.figure(info.change, true)} ${NATS}`]);
    if (info.entropy) found.push(["Entropy so far", `${F.withError(info.entropy.per_sequence, info.entropy.per_sequence_se)} ${NATS}, ${F.withError(info.entropy.per_token, info.entropy.per_token_se)} nats a token`]);
    found.push(["Whole rounds", `${info.rounds}, ${F.count(info.sequences, "response")}`], ["Shards retried", F.whole(status.shards_retried)]);
    return section("Running", 2, h("p", {}, h("b", {}, `${info.id}: ${checkpointOf(info)}`), placeOf(info) ? `, ${placeOf(info)}` : ""),
      bar, progress?.note ? note(F.shardName(progress.note)) : null,
      h("dl", {}, [...list, ...found].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))), h("p", {}, waiting, ` ${F.count(status.ended, "measurement")} ended.`));
  }

  function wrong(status, results) {
    const failed = results.filter((info) => info.state === "failed");
    const lines = [
      ...(status.problem ? [`PROBLEM: ${status.problem}`] : []),
      ...(status.last_failure ? [`LAST FAILURE: ${status.last_failure}`] : []),
      ...status.warnings,
      ...failed.slice(-LISTED).map((info) => `${info.id} failed: ${info.cause ?? "no cause was reported"}`),
      ...(failed.length > LISTED ? [`${failed.length - LISTED} earlier measurements failed; the table of measurements has their causes`] : []),
    ];
    if (!lines.length) return section("Errors and warnings", 2, h("p", {}, "Nothing that this service can see."));
    return section("Errors and warnings", 2, lines.map((line) => h("p", { class: "warning" }, line)));
  }

  function actors(status) {
    const { actors_asked: asked, actors_alive: alive, actors_starting: starting, actors_leaving: leaving } = status;
    const missing = Math.max(0, asked - alive - starting);
    const said = [`asked ${asked}, alive ${alive}, starting ${starting}`, missing ? `${missing} missing` : null, leaving ? `${leaving} leaving` : null].filter(Boolean).join(", ");
    const rows = status.actors.map((actor) => [`actor ${actor.number}`, F.shardName(actor.state), actor.node ?? F.NOT_AVAILABLE, actor.pid === null ? F.NOT_AVAILABLE : String(actor.pid), F.whole(actor.tokens)]);
    const columns = [{ title: "actor", head: true }, { title: "state" }, { title: "node" }, { title: "pid", number: true }, { title: "tokens", number: true }];
    const names = ["CPU", "GPU", ...Object.keys(status.resources).filter((name) => !["CPU", "GPU"].includes(name)).sort()];
    const share = names.map((name) => `${name} ${status.free[name] ?? 0} of ${status.resources[name] ?? 0} free`).join(", ");
    return section("Actors", 2, h("p", { class: missing ? "warning" : null }, said, "."), h("p", {}, "Last failure: ", status.last_failure ?? "none", "."), rows.length ? table("Rollout actors", columns, rows) : null, note(`${F.count(status.nodes, "node")}: ${share}`));
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
    const ratios = variance.advantage_mean_square_ratio ?? {}, square = variance.advantage_mean_square ?? {};
    const rows = MODES.map((mode) => ({
      name: mode === variance.mode ? `${mode} (in use)` : mode, kind: mode === variance.mode ? "total" : "muted",
      value: mode === "none" ? 1 : ratios[mode]?.value, se: mode === "none" ? null : ratios[mode]?.se, text: mode === "none" ? "1" : undefined,
      remark: F.number(square[mode]),
    }));
    const snr = variance.gradient?.snr;
    return h("div", {}, barTable("Mean squared advantage by baseline, ratio to no baseline", "ratio to none", rows, { first: "baseline", signed: false, remark: SQUARE }),
      note(`${F.count(variance.rounds, "whole round")}, ${F.whole(variance.sequences)} responses; beta version ${F.whole(variance.beta_version)}; SNR of the gradient vector ${F.number(snr, 3)}`));
  }

  function measurements(results, selected, choose) {
    const columns = ["id", "step", "checkpoint", "state", "responses", "entropy, nats", "nats a token", "change, nats", "SNR", "when, UTC", "cause"].map((title, place) => ({ title, head: place === 0, number: place === 1 || (place > 3 && place < 9) }));
    const rows = [...results].reverse().map((info) => ({
      attributes: info.id === selected ? { "aria-current": "true" } : {},
      cells: [
        info.rounds ? h("button", { type: "button", class: "link", onclick: () => choose(info.id), "aria-label": `show ${info.id}` }, info.id) : info.id,
        F.isMissing(info.step) ? "" : String(info.step),
        h("span", { title: [info.checkpoint, info.adapter, info.against].filter(Boolean).join(", ") }, checkpointOf(info), info.series ? h("span", { class: "note" }, ` ${info.series}`) : null),
        info.state, F.whole(info.sequences), F.withError(info.entropy?.per_sequence, info.entropy?.per_sequence_se), F.withError(info.entropy?.per_token, info.entropy?.per_token_se),
        info.against ? F.figure(info.change, true) : "", info.against ? "" : F.number(info.gradient?.snr, 3),
        h("span", { class: "number" }, F.utc(info.finished ?? info.started ?? info.submitted).slice(0, 16)), info.cause ?? "",
      ],
    }));
    if (!rows.length) return section("Measurements", 2, h("p", {}, "No measurement yet. Queue one: ray-probe probe CHECKPOINT"));
    return section("Measurements", 2, table("All measurements, newest first", columns, rows), note("± one standard error, prompts as clusters. Of a comparison: the entropy over both checkpoints' responses. Choose an id to see all its figures."));
  }

  return { top, card, running, wrong, actors, noise, measurements, remaining, doneOf };
})();
