/* Talks to the service: requests with the token, and its stream of events. */
"use strict";

RayProbe.connection = (() => {
  const KEY = "ray-probe-token";
  const SILENT_MS = 45000; // the stream has a status a second, or a comment when nothing happens
  const LONGEST_WAIT_MS = 15000;

  class Refused extends Error {} // the token is wrong
  class Away extends Error {} // no answer, or none with what was asked for

  /* The token of the address's fragment, which leaves the address bar, else the one kept for this tab. */
  function token() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (given) {
      sessionStorage.setItem(KEY, given);
      history.replaceState(null, "", location.pathname + location.search);
    }
    return sessionStorage.getItem(KEY);
  }

  const keep = (text) => sessionStorage.setItem(KEY, text);

  /* Wait for the network; whatever it fails with is Away. A fault of the page's own code stays what it is. */
  async function network(work) {
    try {
      return await work;
    } catch (error) {
      throw new Away(error.message);
    }
  }

  async function request(path, signal) {
    const headers = { Authorization: `Bearer ${token() ?? ""}` };
    const answer = await network(fetch(path, { headers, cache: "no-store", signal }));
    if (answer.status === 401 || answer.status === 403)
      throw new Refused(`the service refused the token (${answer.status})`);
    return answer;
  }

  /* The JSON of a path; Away with the service's own line where it refuses. */
  async function get(path) {
    const answer = await request(path);
    const body = await network(answer.json());
    if (!answer.ok) throw new Away(body.error ?? `${path}: status ${answer.status}`);
    return body;
  }

  /* Pass each event of the stream to `heard(kind, data)` until it ends. */
  async function listen(heard) {
    const ending = new AbortController();
    let timer = null;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => ending.abort(), SILENT_MS);
    };
    try {
      alive();
      const answer = await request("v1/events", ending.signal);
      if (!answer.ok) throw new Away(`v1/events: status ${answer.status}`);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await network(reader.read());
        if (done) return;
        alive();
        const events = (text + value).replace(/\r\n/g, "\n").split("\n\n");
        text = events.pop();
        for (const event of events) deliver(event, heard);
      }
    } finally {
      clearTimeout(timer);
      ending.abort();
    }
  }

  function deliver(event, heard) {
    let kind = "message";
    const data = [];
    for (const line of event.split("\n")) {
      const [, field, rest] = /^([^:]*):? ?(.*)$/.exec(line);
      if (field === "event") kind = rest;
      if (field === "data") data.push(rest);
    }
    if (data.length) heard(kind, data.join("\n"));
  }

  /* Stay connected: calls `connected()` at each start, `heard` for events, `lost(error, waitMs)` before each wait.
   *
   * Ends with Refused once the token is wrong, and with any fault of the page. `hurry` is a promise maker that ends a wait early.
   */
  async function follow({ connected, heard, lost, hurry }) {
    let wait = 1000;
    for (;;) {
      let reason = new Away("the service closed the connection");
      try {
        await connected();
        wait = 1000;
        await listen(heard);
      } catch (error) {
        if (!(error instanceof Away)) throw error;
        reason = error;
      }
      lost(reason, wait);
      await Promise.race([new Promise((end) => setTimeout(end, wait)), hurry()]);
      wait = Math.min(LONGEST_WAIT_MS, 2 * wait);
    }
  }

  return { token, keep, get, follow, Refused, Away };
})();
