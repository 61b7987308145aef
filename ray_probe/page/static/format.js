/* Numbers and sentences, in the words of the command line's tables (ray_probe/report). */
"use strict";

globalThis.RayProbe = globalThis.RayProbe ?? {};

RayProbe.format = (() => {
  const NOT_AVAILABLE = "n/a";
  const LOW_SAMPLE_SHARE = 0.1;
  const TRUNCATED_LIMIT = 0.05;
  const LEVEL = 0.05;

  const isMissing = (value) => value === null || value === undefined || Number.isNaN(value);
  const exponent = (value) => Math.floor(Math.log10(Math.abs(value)));

  /* toFixed and toExponential round a tie away from 0, Python rounds it to the even digit. */
  function roundedToEven(long, short, decimals) {
    const [mantissa, power] = long.split("e");
    const kept = mantissa.indexOf(".") < 0 ? mantissa.length : mantissa.indexOf(".") + 1 + decimals;
    if (!/^50*$/.test(mantissa.slice(kept))) return short;
    const cut = mantissa.slice(0, kept).replace(/\.$/, "");
    return "02468".includes(cut.at(-1)) ? cut + (power === undefined ? "" : `e${power}`) : short;
  }

  function fixed(value, decimals) {
    const text = roundedToEven(value.toFixed(Math.min(100, decimals + 60)), value.toFixed(decimals), decimals);
    const [whole, rest] = (Object.is(value, -0) ? `-${text}` : text).split(".");
    const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",");
    return rest === undefined ? grouped : `${grouped}.${rest}`;
  }

  function scientific(value, decimals) {
    const text = roundedToEven(value.toExponential(100), value.toExponential(decimals), decimals);
    return text.replace(/e([+-])(\d)$/, "e$10$2");
  }

  /* A number with significant digits. */
  function number(value, digits = 4) {
    if (isMissing(value)) return NOT_AVAILABLE;
    if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
    if (value === 0) return Object.is(value, -0) ? "-0" : "0";
    if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) return scientific(value, digits - 1);
    return fixed(value, Math.max(0, digits - 1 - exponent(value)));
  }

  /* A whole number: counts and ids. */
  const whole = (value) => (isMissing(value) ? NOT_AVAILABLE : fixed(value, 0));

  function signed(value, digits = 4) {
    const text = number(value, digits);
    return isMissing(value) || value < 0 ? text : `+${text}`;
  }

  /* `value ± se`, both to the second significant digit of the error. */
  function withError(value, se, plus = false) {
    if (plus && value > 0) return `+${withError(value, se)}`;
    if (isMissing(value)) return NOT_AVAILABLE;
    if (isMissing(se) || !Number.isFinite(se) || se === 0) return `${number(value)} ± ${number(se)}`;
    const decimals = 1 - exponent(se);
    const most = Math.max(Math.abs(value), se);
    if (decimals > 6 || most < 1e-3 || most >= 1e6) {
      const digits = Math.max(0, Math.min(6, exponent(value || se) + decimals));
      return `${scientific(value, digits)} ± ${scientific(se, 1)}`;
    }
    return `${fixed(value, Math.max(0, decimals))} ± ${fixed(se, Math.max(0, decimals))}`;
  }

  const lastParts = (path) => String(path).split("/").filter(Boolean).slice(-2).join("/");

  const figure = (one, plus = false) => withError(one?.value, one?.se, plus);
  const entropy = (one) =>
    `${withError(one.per_sequence, one.per_sequence_se)} nats a response, ` +
    `${withError(one.per_token, one.per_token_se)} nats a token`;
  const count = (amount, noun) => `${whole(amount)} ${noun}${amount === 1 ? "" : "s"}`;

  /* A rough count with two significant digits. */
  function about(value) {
    if (isMissing(value) || !Number.isFinite(value)) return NOT_AVAILABLE;
    const rounded = Number(scientific(Math.max(value, 1), 1));
    return `about ${rounded < 1e9 ? fixed(rounded, 0) : scientific(rounded, 1)}`;
  }

  function percent(part, of = 1) {
    if (isMissing(part) || isMissing(of) || of === 0) return NOT_AVAILABLE;
    const share = (100 * part) / of;
    if (share === 0 || share >= 9.95) return `${fixed(share, 0)} %`;
    const digits = scientific(share, 1); // as Python's .2g
    const power = Number(digits.split("e")[1]);
    return power < -4 ? `${digits.replace(/\.0e/, "e")} %` : `${String(Number(digits))} %`;
  }

  /* A span of time in its two largest units. */
  function duration(seconds) {
    let minutes = Math.floor(seconds / 60);
    const rest = Math.floor(seconds) - 60 * minutes;
    let hours = Math.floor(minutes / 60);
    minutes -= 60 * hours;
    const days = Math.floor(hours / 24);
    hours -= 24 * days;
    if (days) return `${days} d ${hours} h`;
    if (hours) return `${hours} h ${minutes} min`;
    return minutes ? `${minutes} min ${rest} s` : `${rest} s`;
  }

  const utc = (iso) => (iso ? `${new Date(iso).toISOString().slice(0, 19).replace("T", " ")} UTC` : NOT_AVAILABLE);

  /* Short names that tell paths apart: as many of their last parts as that takes. */
  function namesOf(places) {
    const parts = places.map((place) => String(place).split("/").filter(Boolean));
    const different = new Set(places).size;
    for (let kept = 1; kept <= Math.max(1, ...parts.map((one) => one.length)); kept++) {
      const names = parts.map((one) => one.slice(-kept).join("/"));
      if (new Set(names).size === different) return names;
    }
    return places.map(String);
  }

  const shardName = (text) =>
    String(text).replace(/(\d+)\/(\d+)/g, (_, round, shard) => `shard ${shard} of round ${Number(round) + 1}`);

  /* Whether the interval of a change leaves 0 out. */
  const isSeen = (total) => Boolean(total.interval) && !(total.interval[0] <= 0 && 0 <= total.interval[1]);

  function longer(one) {
    if (isMissing(one?.value)) return "of unknown length";
    return `${withError(Math.abs(one.value), one.se)} tokens ${one.value >= 0 ? "longer" : "shorter"}`;
  }

  /* What a change of a series or a comparison found, in a sentence. */
  function changeText(change) {
    const total = change.total;
    if (isMissing(total.value)) return "the change of entropy is not known";
    if (isMissing(total.se)) {
      return `entropy changed by ${signed(total.value)} nats a response, without an error: that takes two prompts`;
    }
    if (total.value === 0 && total.se === 0) return "no change: both checkpoints say the same of every response";
    if (isSeen(total)) {
      const token = change.per_token.change ?? change.per_token;
      const length = change.length.change ?? change.length;
      return (
        `entropy changed by ${figure(total, true)} nats a response, ${figure(token, true)} a token: ` +
        `${figure(change.pathwise, true)} at the states visited, ${figure(change.visitation, true)} through which ` +
        `states are visited; responses are ${longer(length)}`
      );
    }
    const [low, high] = total.interval ?? [total.value, total.value];
    return `no change seen; 95 % interval ${number(low, 2)} to ${number(high, 2)} nats a response`;
  }

  /* How to see a change that is not seen yet; null where nothing is to do. */
  function changeAdvice(change) {
    const total = change.total;
    if (!(total.se > 0) || isSeen(total)) return null;
    return `${about(4 * change.responses)} responses for ± ${number(total.se / 2, 2)} nats: add rounds or prompts`;
  }

  function changeCaveats(change) {
    const share = change.effective_sample_share;
    if (isMissing(share) || share >= LOW_SAMPLE_SHARE) return [];
    return [
      `FAR APART: A's responses are worth ${number(share, 2)} of their number for B; the total is unbiased all the ` +
        "same, and the gain over measuring both apart is small. Compare checkpoints that are nearer.",
    ];
  }

  function pointCaveats(point) {
    if (isMissing(point.truncated) || point.truncated <= TRUNCATED_LIMIT) return [];
    return [
      `TRUNCATED: ${percent(point.truncated)} of responses were cut at max_new_tokens. They count, as they must: all ` +
        "figures are those of the capped process. Raise the cap to measure whole responses.",
    ];
  }

  /* Both tails of the normal distribution: a series near 0, a continued fraction further out. */
  function twoSided(z) {
    const x = Math.abs(z) / Math.SQRT2;
    if (x > 27) return 0;
    if (x < 2) {
      let term = x,
        sum = x;
      for (let n = 1; n < 60; n++) sum += (term *= (-x * x) / n) / (2 * n + 1);
      return 1 - (2 / Math.sqrt(Math.PI)) * sum;
    }
    let tail = 0;
    for (let n = 60; n > 0; n--) tail = n / 2 / (x + tail);
    return Math.exp(-x * x) / Math.sqrt(Math.PI) / (x + tail);
  }

  /* Which estimates differ from 0 by Holm's method: the chance of any false mark is 5 % over the figure. */
  function holm(parts) {
    const tails = parts.map(({ value, se }) => (se > 0 && Number.isFinite(value) ? twoSided(value / se) : 1));
    const marked = parts.map(() => false);
    const order = tails.map((_, place) => place).sort((a, b) => tails[a] - tails[b]);
    for (const [rank, place] of order.entries()) {
      if (tails[place] > LEVEL / (parts.length - rank)) break;
      marked[place] = true;
    }
    return marked;
  }

  return {
    NOT_AVAILABLE,
    isMissing,
    number,
    whole,
    signed,
    withError,
    figure,
    count,
    about,
    percent,
    duration,
    utc,
    namesOf,
    shardName,
    lastParts,
    entropy,
    isSeen,
    changeText,
    changeAdvice,
    changeCaveats,
    pointCaveats,
    holm,
  };
})();
