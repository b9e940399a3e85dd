// Server-sent events over fetch. EventSource hides the body of a 422 or 429, which says what is wrong.

import * as key from "./key.js";

const RETRY_AFTER_MS = [500, 2000, 4000]; // within the time that the service keeps a lost stream for

// What is said of an answer that is a problem (RFC 9457): its detail, with the field that it is about.
export class Problem extends Error {
  constructor({ title, detail, errors = [] }, retryAfter = null) {
    const field = errors.length === 1 ? errors[0].field : "";
    const about = field && !detail?.startsWith(field) ? `${field}: ` : "";
    const text = about + (detail || title || "The request failed").trim();
    super((/[.!?]$/.test(text) ? text : `${text}.`) + (retryAfter ? ` Try again in ${retryAfter} s.` : ""));
  }

  static async from(response) {
    const problem = await response.json().catch(() => ({ title: `The service answered ${response.status}` }));
    return new Problem(problem, response.headers.get("Retry-After"));
  }
}

// Yields {type, id, data} until `completed` or `error`. A dropped connection is resumed after the last event received,
// but not before the first: without an event's id the service would start a second job. GET /stream resumes the streams
// of every route. body: that of a POST, else it is a GET.
export async function* follow(url, signal, body = null) {
  const first = body && { method: "POST", body: JSON.stringify(body) };
  const session = crypto.getRandomValues(new Uint32Array(4)).join("-"); // leads to the same one of several replicas
  let lastId = "";
  let drops = 0;
  for (;;) {
    try {
      const headers = { Accept: "text/event-stream", "X-Session-ID": session, ...key.headers() };
      if (lastId) headers["Last-Event-ID"] = lastId;
      else if (body) headers["Content-Type"] = "application/json";
      const options = { headers, signal, cache: "no-store", ...(lastId ? null : first) };
      const response = await fetch(lastId ? "stream" : url, options);
      if (response.status === 204) throw new Problem({ title: "The connection was lost, and the job can no longer be resumed" });
      if (!response.ok) throw await Problem.from(response);
      for await (const event of parse(response.body)) {
        lastId = event.id || lastId;
        drops = 0;
        yield { ...event, data: JSON.parse(event.data) };
        if (event.type === "completed" || event.type === "error") return;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // fetch reports a broken network as a TypeError
      if (!lastId) throw new Problem({ title: "The service cannot be reached" });
    }
    if (!lastId || drops === RETRY_AFTER_MS.length) throw new Problem({ title: "The connection was lost" });
    await pause(RETRY_AFTER_MS[drops++], signal);
  }
}

// The event-stream format of the HTML standard; it discards an event that the end of the stream cuts off.
export async function* parse(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let id = "";
  let type = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a CR that ends a chunk may be half of a CRLF
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { type: type || "message", id, data: data.join("\n") };
          type = "";
          data = [];
          continue;
        }
        const [, field, text] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (field === "data") data.push(text);
        else if (field === "event") type = text;
        else if (field === "id") id = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already, which has been reported
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const cancel = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", cancel);
      resolve();
    }, ms);
    signal.addEventListener("abort", cancel, { once: true });
  });
}
