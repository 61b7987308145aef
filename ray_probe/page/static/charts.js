/* Charts over the trainer's steps, drawn by uPlot: curves with bands, and stacked changes with whiskers. */
"use strict";

RayProbe.charts = (() => {
  const { h } = RayProbe.dom;
  const { figure, number, isMissing } = RayProbe.format;
  const COLORS = ["--curve-1", "--curve-2", "--curve-3", "--curve-4", "--curve-5", "--curve-6"];
  const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3], [12, 4], [4, 2]];
  const PAD = 0.05;

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const phone = () => matchMedia("(max-width: 600px)").matches;

  function axes(xLabel, unit, names) {
    const common = { stroke: color("--ink-2"), grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
    const named = names === null ? { incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000, 100000, 1000000] } : {
      splits: (_, __, low, high) => names.map((_, place) => place).filter((place) => place >= low && place <= high),
      values: (u, splits) => splits.map((place) => (place % Math.ceil(names.length / (u.width / 90)) ? "" : names[place])),
    };
    return [
      { ...common, ...named, label: xLabel, labelSize: 22, size: 28, grid: { show: false } },
      { ...common, label: unit, labelSize: 20, size: (u, values) => 12 + 7 * Math.max(3, ...(values ?? []).map((text) => text.length)), values: (_, splits) => splits.map((one) => shortTick(one, splits)) },
    ];
  }

  function shortTick(value, splits) {
    const gap = splits.length > 1 ? Math.abs(splits[1] - splits[0]) : Math.abs(value) || 1;
    if (Math.abs(value) >= 1e6 || gap < 1e-6) return value.toExponential(1);
    return value.toFixed(Math.max(0, Math.ceil(-Math.log10(gap) - 1e-9)));
  }

  function padded(low, high) {
    if (!Number.isFinite(low) || !Number.isFinite(high)) return [-1, 1];
    const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * PAD;
    return [low - pad, high + pad];
  }

  /* Put a uPlot chart into `host`; it follows the host's width and the colour scheme. `options()` is called anew. */
  function mounted(host, options, data, readout, label) {
    const shown = h("p", { class: "readout" });
    const plot = h("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart", "aria-label": `${label}. Arrow keys step through the points.` });
    host.append(plot, shown);
    let chart = null, place = null;
    const points = data[0].length;
    const show = (at) => { shown.replaceChildren(...readout(at ?? points - 1)); };

    function make() {
      chart?.destroy();
      const width = Math.max(200, Math.floor(plot.clientWidth) || 640);
      const made = options();
      made.width = width;
      made.height = phone() ? 220 : 280;
      made.legend = { show: false };
      made.hooks = { ...made.hooks, setCursor: [(u) => { place = u.cursor.idx; show(place); }] };
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
    return () => { resized.disconnect(); scheme.removeEventListener("change", repaint); chart.destroy(); };
  }

  const cursor = (sync) => ({ y: false, sync: sync === null ? undefined : { key: sync, scales: ["x", null] }, points: { size: 9 }, drag: { x: true, y: false } });

  /* Curves with bands of one standard error.
   *
   * curves: [{name, points: [{x, value, se, label}]}]; names: of the places 0, 1, ... on the axis, or null for steps.
   * Returns a function that removes the chart.
   */
  function curve(host, { curves, unit, xLabel, names, sync, label }) {
    const tables = curves.map(({ points }) => {
      const known = points.filter((point) => !isMissing(point.value));
      const error = (point) => (isMissing(point.se) ? 0 : point.se);
      return [known.map((p) => p.x), known.map((p) => p.value), known.map((p) => p.value - error(p)), known.map((p) => p.value + error(p))];
    });
    const data = tables.length === 1 ? tables[0] : uPlot.join(tables);
    const at = (index) => curves.map(({ points }) => points.find((point) => point.x === data[0][index]));
    const low = Math.min(...tables.flatMap((one) => one[2])), high = Math.max(...tables.flatMap((one) => one[3]));

    function options() {
      const series = [{}], bands = [];
      for (const [place] of curves.entries()) {
        const stroke = color(COLORS[place % COLORS.length]);
        const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
        bands.push({ series: [3 * place + 3, 3 * place + 2], fill: `${stroke}33` });
        series.push({ stroke, width: 2, dash: DASHES[place % DASHES.length], spanGaps: true, points: { show: true, size: 7, fill: stroke, width: 0 } }, edge, { ...edge });
      }
      return {
        series, bands, axes: axes(xLabel, unit, names), cursor: cursor(sync),
        scales: { x: { time: false, range: (_, from, to) => padded(from, to) }, y: { range: () => padded(low, high) } },
      };
    }

    const readout = (index) => at(index).flatMap((point, place) => {
      if (point === undefined) return [];
      const name = curves.length > 1 ? `${curves[place].name}: ` : "";
      return [h("span", {}, swatch(place), `${name}${point.label}: ${figure(point)} ${unit}`)];
    });
    return mounted(host, options, data, readout, label);
  }

  const swatch = (place) => h("i", { class: `swatch curve-${(place % COLORS.length) + 1}`, "aria-hidden": "true" });

  /* The change of each step: pathwise and visitation stacked, the total as a diamond, all with whiskers.
   *
   * changes: [{from, to, label, total, pathwise, visitation}], from and to on the axis.
   */
  function changes(host, { changes: found, unit, xLabel, names, sync, range, label }) {
    const data = [found.map((one) => one.to), found.map((one) => one.total.value ?? null)];
    const [least, most] = range;

    function options() {
      return {
        series: [{}, { stroke: color("--ink"), paths: () => null, points: { show: false } }],
        axes: axes(xLabel, unit, names), cursor: cursor(sync),
        scales: {
          x: { time: false, range: (u, from, to) => padded(from === data[0][0] ? Math.min(found[0].from, from) : from, to) },
          y: { range: () => padded(least, most) },
        },
        hooks: { draw: [(u) => drawChanges(u, found)] },
      };
    }

    const readout = (index) => {
      const one = found[index];
      return [
        h("span", {}, `${one.label}: `, h("i", { class: "swatch total", "aria-hidden": "true" }), `total ${figure(one.total, true)}`),
        h("span", {}, h("i", { class: "swatch pathwise", "aria-hidden": "true" }), `pathwise ${figure(one.pathwise, true)}`),
        h("span", {}, h("i", { class: "swatch visitation", "aria-hidden": "true" }), `visitation ${figure(one.visitation, true)} ${unit}`),
      ];
    };
    return mounted(host, options, data, readout, label);
  }

  function drawChanges(u, found) {
    const { ctx } = u, ratio = devicePixelRatio;
    const x = (value) => u.valToPos(value, "x", true), y = (value) => u.valToPos(value, "y", true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    ctx.clip();
    ctx.lineWidth = 1.5 * ratio;
    for (const one of found) {
      const from = x(one.from), width = Math.min(x(one.to) - from, 120 * ratio) * 0.76, left = (from + x(one.to) - width) / 2;
      const p = one.pathwise.value ?? 0, v = one.visitation.value ?? 0, base = p * v > 0 ? p : 0;
      fillBar(ctx, left, width, y(0), y(p), color("--pathwise"));
      fillBar(ctx, left, width, y(base), y(base + v), color("--visitation"));
      ctx.strokeStyle = color("--ink");
      whisker(ctx, left + 0.22 * width, y, p, one.pathwise.se, ratio);
      whisker(ctx, left + 0.78 * width, y, base + v, one.visitation.se, ratio);
      whisker(ctx, left + 0.5 * width, y, one.total.value, one.total.se, ratio);
      diamond(ctx, left + 0.5 * width, y(one.total.value ?? 0), 5 * ratio);
    }
    ctx.strokeStyle = color("--ink");
    ctx.beginPath();
    ctx.moveTo(u.bbox.left, y(0));
    ctx.lineTo(u.bbox.left + u.bbox.width, y(0));
    ctx.stroke();
    ctx.restore();
  }

  function fillBar(ctx, left, width, from, to, fill) {
    ctx.fillStyle = fill;
    ctx.fillRect(left, Math.min(from, to), width, Math.abs(to - from));
  }

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

  function diamond(ctx, x, y, size) {
    ctx.fillStyle = color("--paper");
    ctx.beginPath();
    ctx.moveTo(x, y - size);
    ctx.lineTo(x + size, y);
    ctx.lineTo(x, y + size);
    ctx.lineTo(x - size, y);
    ctx.closePath();
    ctx.fill();
    ctx.stroke();
  }

  /* The lowest and the highest end of bars and whiskers over several charts, so that they share an axis. */
  function rangeOf(found) {
    const ends = found.flatMap(({ total, pathwise, visitation }) => {
      const p = pathwise.value ?? 0, v = visitation.value ?? 0, base = p * v > 0 ? p : 0;
      const parts = [[p, pathwise.se], [base + v, visitation.se], [total.value ?? 0, total.se]];
      return parts.flatMap(([value, se]) => [value - (se ?? 0), value + (se ?? 0)]);
    });
    return [Math.min(0, ...ends), Math.max(0, ...ends)];
  }

  return { curve, changes, rangeOf, swatch, number };
})();
