/* Draws the state of a service: the running measurement, actors, what is wrong, all measurements. */
"use strict";

RayProbe.service = (() => {
  const { h, section, note, table } = RayProbe.dom;
  const F = RayProbe.format;
  const NATS = "nats a response";
  const LISTED = 8;
  const RATE_S = 20;
  const STATES = { idle: "good", measuring: "busy", loading: "busy", starting: "busy", failed: "bad", closing: "bad" };

  function top(status, first, live) {
    const { measurement, progress } = status;
    const left = progress === null ? null : remaining(progress, first);
    const work =
      measurement === null
        ? null
        : [
            measurement.id,
            progress?.rounds ? `round ${progress.round + 1} of ${progress.rounds}` : null,
            left === null ? null : `about ${F.duration(Math.max(1, left))} left`,
          ]
            .filter(Boolean)
            .join(", ");
    const state = status.draining ? `${status.state}, draining` : status.state;
    return [
      h(
        "div",
        { class: "bar-top" },
        h("h1", {}, `${status.kind} ${status.name}`),
        h("span", { class: `state ${STATES[status.state] ?? ""}` }, state),
        work === null ? null : h("span", {}, work),
        h("span", { class: "note" }, live ? "live" : "not connected"),
      ),
      note(`since ${F.utc(status.since)}; files in ${status.directory}`),
    ];
  }

  const checkpointOf = (info) =>
    [
      F.lastParts(info.checkpoint),
      info.adapter ? ` + ${F.lastParts(info.adapter)}` : "",
      info.against ? ` against ${F.lastParts(info.against)}` : "",
    ].join("");
  const placeOf = (info) =>
    [
      info.series ? `series ${info.series}` : null,
      F.isMissing(info.step) ? null : `step ${info.step}`,
      ...Object.entries(info.tags ?? {}).map(([key, value]) => `${key}=${value}`),
    ]
      .filter(Boolean)
      .join(", ");

  /* The newest figures of a service without a series. */
  function card(info) {
    const { entropy, change } = info;
    return h(
      "article",
      { class: "card" },
      h("h3", {}, `${info.id}: ${checkpointOf(info)}`),
      change ? h("p", { class: "big" }, h("b", {}, F.figure(change, true)), ` ${NATS}, change`) : null,
      h(
        "p",
        { class: change ? "big second" : "big" },
        h("b", {}, F.withError(entropy.per_sequence, entropy.per_sequence_se)),
        ` ${NATS}${change ? ", both checkpoints" : ""}`,
      ),
      h(
        "p",
        { class: "big second" },
        h("b", {}, F.withError(entropy.per_token, entropy.per_token_se)),
        " nats a token",
      ),
      h("p", { class: "where" }, `${F.count(info.sequences, "response")}, ${info.state}`),
    );
  }

  /* Share of the run's shards that are done; null where a budget ends it. */
  const doneOf = (p) =>
    p.rounds ? (p.round + (p.shards ? (p.collected + p.accumulated) / (2 * p.shards) : 0)) / p.rounds : null;

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
      [
        "Time left",
        rounds === null
          ? "not known: a budget ends it"
          : left === null
            ? "not yet known"
            : `about ${F.duration(Math.max(1, left))}`,
      ],
      ["Sampled", `${F.whole(tokens)} tokens in ${F.duration(elapsed)}`],
      ["Beta", progress.version ? `version ${progress.version}` : "none yet"],
      ["Noise left by the baseline", `${F.number(progress.variance_ratio, 3)}, mean square to that of none, so far`],
    ];
  }

  function queueOf(queued) {
    if (!queued.length) return "Queue: nothing waits.";
    const more = queued.length > LISTED ? ` and ${queued.length - LISTED} more` : "";
    return `Queue: ${queued.length} waiting, ${queued.slice(0, LISTED).join(", ")}${more}.`;
  }

  function running(status, first) {
    const { measurement: info, progress, queued } = status;
    const waiting = queueOf(queued);
    if (info === null)
      return section(
        "Running",
        2,
        h("p", {}, "No measurement runs. ", waiting, ` ${F.count(status.ended, "measurement")} ended.`),
      );
    const done = progress === null || progress.rounds === 0 ? null : doneOf(progress);
    const bar =
      progress === null ? null : h("progress", { "aria-label": "progress of the measurement", max: "1", value: done });
    const list =
      progress === null || progress.rounds === 0
        ? [["Round", "before its first shard"]]
        : progressRows(progress, first);
    const found = [];
    if (info.change) found.push(["Change so far", `${F.figure(info.change, true)} ${NATS}`]);
    if (info.entropy) found.push(["Entropy so far", F.entropy(info.entropy)]);
    found.push(
      ["Whole rounds", `${info.rounds} with ${F.count(info.sequences, "response")}`],
      ["Shards retried", F.whole(status.shards_retried)],
    );
    return section(
      "Running",
      2,
      h("p", {}, h("b", {}, `${info.id}: ${checkpointOf(info)}`), placeOf(info) ? `, ${placeOf(info)}` : ""),
      bar,
      progress?.note ? note(F.shardName(progress.note)) : null,
      h(
        "dl",
        {},
        [...list, ...found].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
      ),
      h("p", {}, waiting, ` ${F.count(status.ended, "measurement")} ended.`),
    );
  }

  function wrong(status, results) {
    const failed = results.filter((info) => info.state === "failed");
    const lines = [
      ...(status.problem ? [`PROBLEM: ${status.problem}`] : []),
      ...(status.last_failure ? [`LAST FAILURE: ${status.last_failure}`] : []),
      ...status.warnings,
      ...failed.slice(-LISTED).map((info) => `${info.id} failed: ${info.cause ?? "no cause was reported"}`),
      ...(failed.length > LISTED
        ? [`${failed.length - LISTED} earlier measurements failed; the table of measurements has their causes`]
        : []),
    ];
    if (!lines.length) return note("Errors and warnings: nothing that this service can see.");
    return section(
      "Errors and warnings",
      2,
      lines.map((line) => h("p", { class: "warning" }, line)),
    );
  }

  function actors(status) {
    const { actors_asked: asked, actors_alive: alive, actors_starting: starting, actors_leaving: leaving } = status;
    const missing = Math.max(0, asked - alive - starting);
    const said = [
      `asked ${asked}, alive ${alive}, starting ${starting}`,
      missing ? `${missing} missing` : null,
      leaving ? `${leaving} leaving` : null,
    ]
      .filter(Boolean)
      .join(", ");
    const rows = status.actors.map((actor) => [
      `actor ${actor.number}`,
      F.shardName(actor.state),
      actor.node ?? F.NOT_AVAILABLE,
      actor.pid === null ? F.NOT_AVAILABLE : String(actor.pid),
      F.whole(actor.tokens),
    ]);
    const columns = [
      { title: "actor", head: true },
      { title: "state" },
      { title: "node" },
      { title: "pid", number: true },
      { title: "tokens", number: true },
    ];
    const names = [
      "CPU",
      "GPU",
      ...Object.keys(status.resources)
        .filter((name) => !["CPU", "GPU"].includes(name))
        .sort(),
    ];
    const share = names
      .map((name) => `${name} ${status.free[name] ?? 0} of ${status.resources[name] ?? 0} free`)
      .join(", ");
    return section(
      "Actors",
      2,
      h("p", { class: missing ? "warning" : null }, said, "."),
      h("p", {}, "Last failure: ", status.last_failure ?? "none", "."),
      rows.length ? table("Rollout actors", columns, rows) : null,
      note(`${F.count(status.nodes, "node")}: ${share}`),
    );
  }

  function measurements(results, selected, choose) {
    const columns = [
      "id",
      "step",
      "checkpoint",
      "state",
      "responses",
      "entropy, nats",
      "nats a token",
      "change, nats",
      "SNR",
      "when, UTC",
    ].map((title, place) => ({ title, head: place === 0, number: place === 1 || (place > 3 && place < 9) }));
    const rows = [...results].reverse().map((info) => ({
      attributes: info.id === selected ? { "aria-current": "true" } : {},
      below: info.cause ? `${info.id}${info.state === "failed" ? " failed" : ""}: ${info.cause}` : null,
      cells: [
        info.rounds
          ? h(
              "button",
              { type: "button", class: "link", onclick: () => choose(info.id), "aria-label": `show ${info.id}` },
              info.id,
            )
          : info.id,
        F.isMissing(info.step) ? "" : String(info.step),
        h(
          "span",
          { class: "checkpoint", title: [info.checkpoint, info.adapter, info.against].filter(Boolean).join(", ") },
          checkpointOf(info),
          info.series ? h("span", { class: "note" }, ` ${info.series}`) : null,
        ),
        info.state,
        F.whole(info.sequences),
        F.withError(info.entropy?.per_sequence, info.entropy?.per_sequence_se),
        F.withError(info.entropy?.per_token, info.entropy?.per_token_se),
        info.against ? F.figure(info.change, true) : "",
        info.against ? "" : F.number(info.gradient?.snr, 3),
        h("span", { class: "number" }, F.utc(info.finished ?? info.started ?? info.submitted).slice(0, 16)),
      ],
    }));
    if (!rows.length)
      return section("Measurements", 2, h("p", {}, "No measurement yet. Queue one: ray-probe probe CHECKPOINT"));
    return section(
      "Measurements",
      2,
      table("All measurements, newest first", columns, rows),
      note(
        "± one standard error, prompts as clusters. Of a comparison: the entropy over both checkpoints' responses. " +
          "Choose an id to see all its figures.",
      ),
    );
  }

  return { top, card, running, wrong, actors, noise, measurements, remaining, doneOf };
})();
