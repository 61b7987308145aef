/* The change from checkpoint to checkpoint as stacked bars with whiskers, on uPlot's canvas. */
"use strict";

RayProbe.changeBars = (() => {
  const { h } = RayProbe.dom;
  const { figure } = RayProbe.format;
  const { mounted, axes, cursor, padded, color, whisker } = RayProbe.charts;

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
        axes: axes(xLabel, unit, names, [found[0].from, ...data[0]]),
        cursor: cursor(sync),
        scales: {
          x: {
            time: false,
            range: (_, from, to) => {
              if (found.length === 1) return padded(found[0].from, found[0].to);
              return padded(from === data[0][0] ? Math.min(...found.map((one) => one.from)) : from, to);
            },
          },
          y: { range: () => padded(least, most) },
        },
        hooks: { draw: [(u) => drawChanges(u, found)] },
      };
    }

    const readout = (index) => {
      const one = found[index];
      return [
        h(
          "span",
          {},
          `${one.label}: `,
          h("i", { class: "swatch total", "aria-hidden": "true" }),
          `total ${figure(one.total, true)}`,
        ),
        h(
          "span",
          {},
          h("i", { class: "swatch pathwise", "aria-hidden": "true" }),
          `pathwise ${figure(one.pathwise, true)}`,
        ),
        h(
          "span",
          {},
          h("i", { class: "swatch visitation", "aria-hidden": "true" }),
          `visitation ${figure(one.visitation, true)} ${unit}`,
        ),
      ];
    };
    return mounted(host, options, data, readout, label);
  }

  function drawChanges(u, found) {
    const { ctx } = u,
      ratio = devicePixelRatio;
    const x = (value) => u.valToPos(value, "x", true),
      y = (value) => u.valToPos(value, "y", true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    ctx.clip();
    ctx.lineWidth = 1.5 * ratio;
    for (const one of found) {
      const from = x(one.from),
        width = Math.min(x(one.to) - from, 120 * ratio) * 0.76,
        left = (from + x(one.to) - width) / 2;
      const p = one.pathwise.value ?? 0,
        v = one.visitation.value ?? 0,
        base = p * v > 0 ? p : 0;
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
      const p = pathwise.value ?? 0,
        v = visitation.value ?? 0,
        base = p * v > 0 ? p : 0;
      const parts = [
        [p, pathwise.se],
        [base + v, visitation.se],
        [total.value ?? 0, total.se],
      ];
      return parts.flatMap(([value, se]) => [value - (se ?? 0), value + (se ?? 0)]);
    });
    return [Math.min(0, ...ends), Math.max(0, ...ends)];
  }

  return { changes, rangeOf };
})();
