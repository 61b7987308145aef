/* Charts over the trainer's steps, drawn by uPlot: frame, axes, keyboard, and curves with bands. */
"use strict";

RayProbe.charts = (() => {
  const { h } = RayProbe.dom;
  const { figure, isMissing } = RayProbe.format;
  const COLORS = ["--curve-1", "--curve-2", "--curve-3", "--curve-4", "--curve-5", "--curve-6"];
  const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3], [12, 4], [4, 2]];
  const PAD = 0.05;
  const STEPS = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500].flatMap((one) => [one, 1000 * one]).sort((a, b) => a - b);

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const phone = () => matchMedia("(max-width: 600px)").matches;

  /* Axes; ticks on x are the points themselves where they fit. `names` are those of the places 0, 1, ... */
  function axes(xLabel, unit, names, xs) {
    const common = {
      stroke: color("--ink-2"),
      grid: { stroke: color("--grid"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
      labelFont: "12px system-ui, sans-serif",
    };
    const inside = (low, high) => xs.filter((x) => x >= low && x <= high);
    const fit =
      xs.length <= 15 &&
      xs.every((x, place) => place === 0 || x - xs[place - 1] >= (xs.at(-1) - xs[0]) / (phone() ? 6 : 16));
    const named =
      names === null
        ? fit
          ? { splits: (_, __, low, high) => inside(low, high) }
          : { incrs: STEPS }
        : {
            splits: (_, __, low, high) =>
              names.map((_, place) => place).filter((place) => place >= low && place <= high),
            values: (u, splits) =>
              splits.map((place) => (place % Math.ceil(names.length / (u.width / 90)) ? "" : names[place])),
          };
    return [
      { ...common, ...named, label: xLabel, labelSize: 22, size: 28, grid: { show: false } },
      {
        ...common,
        label: unit,
        labelSize: 20,
        size: (u, values) => 12 + 7 * Math.max(3, ...(values ?? []).map((text) => text.length)),
        values: (_, splits) => splits.map((one) => shortTick(one, splits)),
      },
    ];
  }

  /* A tick with the decimals that its distance to the next one needs. */
  function shortTick(value, splits) {
    const gap = splits.length > 1 ? Math.abs(splits[1] - splits[0]) : Math.abs(value) || 1;
    if (Math.abs(value) >= 1e6 || gap < 1e-6) return value.toExponential(1);
    let decimals = 0;
    while (decimals < 8 && Math.abs(gap * 10 ** decimals - Math.round(gap * 10 ** decimals)) > 1e-6) decimals++;
    return value.toFixed(decimals);
  }

  function padded(low, high) {
    if (!Number.isFinite(low) || !Number.isFinite(high)) return [-1, 1];
    const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * PAD;
    return [low - pad, high + pad];
  }

  /* Put a uPlot chart into `host`; it follows the host's width and the colour scheme. `options()` is called anew. */
  function mounted(host, options, data, readout, label) {
    const shown = h("p", { class: "readout" });
    const plot = h("div", {
      class: "plot",
      tabindex: "0",
      role: "group",
      "aria-roledescription": "chart",
      "aria-label": `${label}. Arrow keys step through the points.`,
    });
    host.append(plot, shown);
    let chart = null,
      place = null;
    const points = data[0].length;
    const show = (at) => {
      shown.replaceChildren(...readout(at ?? points - 1));
    };

    function make() {
      chart?.destroy();
      const width = Math.max(200, Math.floor(plot.clientWidth) || 640);
      const made = options();
      made.width = width;
      made.height = phone() ? 220 : 280;
      made.legend = { show: false };
      made.hooks = {
        ...made.hooks,
        setCursor: [
          (u) => {
            place = u.cursor.idx;
            show(place);
          },
        ],
      };
      chart = new uPlot(made, data, plot);
    }

    function step(event) {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (event.key === "Escape") chart.setCursor({ left: -10, top: -10 });
      if (!(event.key in moves)) return;
      event.preventDefault();
      const to = Math.max(0, Math.min(points - 1, (place ?? (moves[event.key] < 0 ? points : -1)) + moves[event.key]));
      chart.setCursor({ left: chart.valToPos(data[0][to], "x"), top: chart.over.clientHeight / 2 });
    }

    plot.addEventListener("keydown", step);
    plot.addEventListener("focus", () => shown.setAttribute("aria-live", "polite"));
    plot.addEventListener("blur", () => shown.removeAttribute("aria-live"));
    make();
    show(null);
    let width = plot.clientWidth;
    const resized = new ResizeObserver(() => {
      if (plot.clientWidth === width || !plot.isConnected) return;
      width = plot.clientWidth;
      chart.setSize({ width: Math.max(200, width), height: phone() ? 220 : 280 });
    });
    resized.observe(plot);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const repaint = () => make();
    scheme.addEventListener("change", repaint);
    return () => {
      resized.disconnect();
      scheme.removeEventListener("change", repaint);
      chart.destroy();
    };
  }

  const cursor = (sync) => ({
    y: false,
    sync: sync === null ? undefined : { key: sync, scales: ["x", null] },
    points: { size: 9 },
    drag: { x: true, y: false },
  });

  function whisker(ctx, x, y, value, se, ratio) {
    if (isMissing(value) || isMissing(se) || !(se > 0)) return;
    const cap = 3.5 * ratio;
    ctx.beginPath();
    for (const end of [y(value - se), y(value + se)]) {
      ctx.moveTo(x - cap, end);
      ctx.lineTo(x + cap, end);
    }
    ctx.moveTo(x, y(value - se));
    ctx.lineTo(x, y(value + se));
    ctx.stroke();
  }

  /* Error bars of curves that are a single point: it has no band. */
  function drawSingles(u, tables) {
    u.ctx.save();
    u.ctx.lineWidth = 1.5 * devicePixelRatio;
    for (const [place, [xs, values, , highs]] of tables.entries()) {
      if (xs.length !== 1) continue;
      u.ctx.strokeStyle = color(COLORS[place % COLORS.length]);
      const y = (value) => u.valToPos(value, "y", true);
      whisker(u.ctx, u.valToPos(xs[0], "x", true), y, values[0], highs[0] - values[0], devicePixelRatio);
    }
    u.ctx.restore();
  }

  /* Curves with bands of one standard error.
   *
   * curves: [{name, points: [{x, value, se, label}]}]; names: of the places 0, 1, ... on the axis, or null for steps.
   * Returns a function that removes the chart.
   */
  function curve(host, { curves, unit, xLabel, names, sync, label }) {
    const tables = curves.map(({ points }) => {
      const known = points.filter((point) => !isMissing(point.value));
      const error = (point) => (isMissing(point.se) ? 0 : point.se);
      return [
        known.map((p) => p.x),
        known.map((p) => p.value),
        known.map((p) => p.value - error(p)),
        known.map((p) => p.value + error(p)),
      ];
    });
    const data = tables.length === 1 ? tables[0] : uPlot.join(tables);
    const at = (index) => curves.map(({ points }) => points.find((point) => point.x === data[0][index]));
    const low = Math.min(...tables.flatMap((one) => one[2])),
      high = Math.max(...tables.flatMap((one) => one[3]));

    const points = data[0].length;

    function options() {
      const series = [{}],
        bands = [];
      for (const [place] of curves.entries()) {
        const stroke = color(COLORS[place % COLORS.length]);
        const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
        bands.push({ series: [3 * place + 3, 3 * place + 2], fill: `${stroke}33` });
        series.push(
          {
            stroke,
            width: 2,
            dash: DASHES[place % DASHES.length],
            spanGaps: true,
            points: { show: true, size: 7, fill: stroke, width: 0 },
          },
          edge,
          { ...edge },
        );
      }
      return {
        series,
        bands,
        axes: axes(xLabel, unit, names, data[0]),
        cursor: cursor(sync),
        hooks: { draw: [(u) => drawSingles(u, tables)] },
        scales: {
          x: {
            time: false,
            range: (_, from, to) => (points === 1 ? padded(data[0][0], data[0][0]) : padded(from, to)),
          },
          y: { range: () => padded(low, high) },
        },
      };
    }

    const readout = (index) =>
      at(index).flatMap((point, place) => {
        if (point === undefined) return [];
        const name = curves.length > 1 ? `${curves[place].name}: ` : "";
        return [h("span", {}, swatch(place), `${name}${point.label}: ${figure(point)} ${unit}`)];
      });
    return mounted(host, options, data, readout, label);
  }

  const swatch = (place) => h("i", { class: `swatch curve-${(place % COLORS.length) + 1}`, "aria-hidden": "true" });

  return { curve, swatch, mounted, axes, cursor, padded, color, whisker };
})();
