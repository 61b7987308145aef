/* The live page: keeps what the service says, and draws what changed. */
"use strict";

(() => {
  const { h, section } = RayProbe.dom;
  const { resultView } = RayProbe.render;
  const { token, keep, get, follow, Refused, Away } = RayProbe.connection;
  const service = RayProbe.service;
  const known = {
    status: null,
    results: [],
    series: [],
    entry: null,
    beta: "not yet asked for",
    variance: "not yet asked for",
  };
  const chosen = {}; // metric and part that the reader chose in the charts
  const removers = {};
  const drawn = {};
  let selected = null,
    first = null,
    live = false,
    silent = false, // the stream said that the service does not answer
    hurried = () => {};

  const place = (id) => document.getElementById(id);

  /* The JSON of a value; replies are kept, so that each is written once. */
  const texts = new WeakMap();
  function textOf(value) {
    if (value === null || typeof value !== "object") return JSON.stringify(value) ?? "";
    if (!texts.has(value)) texts.set(value, JSON.stringify(value));
    return texts.get(value);
  }

  /* Draw a part again where its data have changed. `draw` may return a function that removes its charts. */
  function update(id, data, draw) {
    const signature = data.map(textOf).join();
    if (drawn[id] === signature) return;
    drawn[id] = signature;
    removers[id]?.();
    removers[id] = undefined;
    const host = place(id),
      focus = host.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    host.replaceChildren();
    removers[id] = draw(host) ?? undefined;
    if (focus !== null) host.querySelector(`[aria-label="${CSS.escape(focus)}"]`)?.focus();
  }

  function draw() {
    if (known.status === null) return;
    document.title = `${known.status.name}: ${known.status.state}`;
    drawTop();
    drawState();
    drawFigures();
  }

  function drawTop() {
    const { status } = known;
    if (status === null) return;
    const data = [status.kind, status.name, status.state, status.draining, status.measurement, status.progress, live];
    update("top", data, (host) => host.append(...service.top(status, first, live)));
  }

  function drawState() {
    const { status, results, beta, variance } = known;
    const { measurement, progress, queued, ended, shards_retried: retried, actors, last_failure: failure } = status;
    const problems = [status.problem, failure, status.warnings, results];
    const counts = [actors, status.actors_asked, status.actors_alive, status.actors_starting, failure, status.free];
    update("wrong", problems, (host) => host.append(service.wrong(status, results)));
    update("running", [measurement, progress, queued, ended, retried], (host) =>
      host.append(service.running(status, first)),
    );
    update("actors", counts, (host) => host.append(service.actors(status)));
    update("noise", [beta, variance], (host) => host.append(RayProbe.baseline.noise(beta, variance)));
  }

  function drawFigures() {
    const { results, series, entry } = known;
    const shown = entry?.info.id;
    update("headline", [series, series.length ? null : results], (host) => host.append(headline(series, results)));
    update("series", [series], (host) => {
      if (series.length) return RayProbe.series.view(host, series, 2, chosen);
    });
    update("measurements", [results, shown], (host) => host.append(service.measurements(results, shown, choose)));
    update("result", [entry], (host) => {
      if (entry !== null) return drawResult(host, entry);
    });
  }

  function headline(series, results) {
    const measured = results.filter((info) => info.entropy !== null);
    if (series.length)
      return section(
        series.length > 1 ? "Newest checkpoints" : "Newest checkpoint",
        2,
        h(
          "div",
          { class: "cards" },
          series.map((one) => RayProbe.series.card(one, 3)),
        ),
      );
    if (!measured.length)
      return section(
        "Newest measurement",
        2,
        h("p", {}, "Nothing is measured yet: figures come with the first whole round."),
      );
    return section("Newest measurement", 2, h("div", { class: "cards" }, service.card(measured.at(-1))));
  }

  function drawResult(host, { info, result, words }) {
    if (result === null) {
      host.append(section(info.id, 2, h("p", {}, "No whole round yet.")));
      return;
    }
    const { node, draw: drawCharts } = resultView({ name: info.id, result, words }, 3);
    host.append(section(`All figures of ${info.id}`, 2, node));
    const ends = drawCharts();
    return () => ends.forEach((end) => end());
  }

  function choose(id) {
    selected = id;
    refresh();
    place("result").scrollIntoView({
      behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
    });
  }

  let busy = null,
    again = false;

  /* Fetch everything but the status; calls during a fetch lead to one more. */
  function refresh() {
    again = true;
    busy ??= (async () => {
      try {
        while (again) {
          again = false;
          await fetchAll();
          draw();
        }
      } finally {
        busy = null;
      }
    })();
    return busy;
  }

  async function fetchAll() {
    const [results, series] = await Promise.all([get("v1/results"), get("v1/series")]);
    const measured = results.filter((info) => info.rounds > 0);
    const newest = measured.findLast((info) => info.state !== "running") ?? measured.at(-1);
    const shown = results.some((info) => info.id === selected) ? selected : newest?.id;
    const { measurement, progress } = known.status;
    const fitted = progress?.version > 0 ? measurement?.id : measured.at(-1)?.id;
    const [entry, beta, variance] = await Promise.all([
      shown === undefined ? null : get(`v1/results/${encodeURIComponent(shown)}`),
      ofMeasurement("v1/beta", fitted),
      ofMeasurement("v1/variance", measured.at(-1)?.id),
    ]);
    Object.assign(known, { results, series, beta, variance, entry });
  }

  /* A reply of one measurement, or why there is none: a fit comes with the first round. */
  const ofMeasurement = (path, id) =>
    id === undefined ? "comes with the first round" : get(`${path}?measurement=${encodeURIComponent(id)}`);

  const stage = (status) =>
    JSON.stringify([
      status?.ended,
      status?.queued,
      status?.measurement?.id,
      status?.measurement?.rounds,
      status?.progress?.version,
    ]);

  function heard(kind, data) {
    if (kind === "status") {
      const before = known.status;
      known.status = JSON.parse(data);
      const { progress, measurement } = known.status;
      if (measurement?.id !== before?.measurement?.id || first === null) first = progress;
      draw();
      if (stage(before) !== stage(known.status)) background();
      if (silent) say();
      silent = false;
    } else if (kind === "result") background();
    else if (kind === "error") {
      silent = true;
      say(`The service does not answer: ${JSON.parse(data).error}. What is shown is from before.`);
    }
  }

  const background = () => refresh().catch(failed);

  /* Say what went wrong; a fault of the page itself also goes to the console. */
  function failed(error) {
    if (error instanceof Away) say(`Could not read the results: ${error.message}.`);
    else if (error instanceof Refused) signIn(`The service refused this token. ${HOW}.`);
    else {
      say(`The page failed: ${error.message}. Reload it.`);
      throw error;
    }
  }

  function say(...parts) {
    place("banner").replaceChildren(...(parts.length ? [h("p", { class: "banner" }, parts)] : []));
  }

  async function connected() {
    known.status = await get("v1/status");
    await refresh();
    live = true;
    say();
    draw();
  }

  function lost(reason, waitMs) {
    live = false;
    draw();
    const now = new Date().toISOString().slice(11, 19);
    const again = h("button", { type: "button", onclick: () => hurried() }, "Try now");
    const next = Math.round(waitMs / 1000);
    say(
      `Connection lost at ${now} UTC: ${reason.message}. What is shown is from before. Next try in ${next} s. `,
      again,
    );
  }

  function signIn(reason) {
    const field = h("input", { id: "token", type: "password", autocomplete: "off", required: true });
    const entered = (event) => {
      event.preventDefault();
      keep(field.value.trim());
      place("sign-in").replaceChildren();
      start();
    };
    place("sign-in").replaceChildren(
      h(
        "form",
        { onsubmit: entered },
        h("p", { class: "banner" }, reason),
        h("p", {}, h("label", { for: "token" }, "Token: "), field, " ", h("button", {}, "Open")),
      ),
    );
    field.focus();
  }

  const HOW = "ray-probe serve and ray-probe up --http print the address with the token";

  async function start() {
    if (token() === null) return signIn(`This page needs the service's token. ${HOW}.`);
    try {
      await follow({
        connected,
        heard,
        lost,
        hurry: () =>
          new Promise((end) => {
            hurried = end;
          }),
      });
    } catch (error) {
      live = false;
      say();
      drawTop();
      failed(error);
    }
  }

  addEventListener("hashchange", () => {
    if (token() !== null) location.reload();
  });
  addEventListener("DOMContentLoaded", start);
})();
