/** Calls of the server, with the API key if one was given. */

const KEY = "fanin-api-key"; // in sessionStorage: gone with the tab, never in the address

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer that is an error: application/problem+json, or whatever a proxy or the network made of it. */
export class Problem extends Error {
  constructor(status, body, retryAfter_s) {
    super(body.detail);
    const { title, errors = [], request_id } = body;
    Object.assign(this, { status, title, errors, request_id, body, retryAfter_s });
  }
}

/**
 * The server's answer as {answer, elapsed_ms, server_ms}; server_ms holds the stages of Server-Timing.
 * With a body it is a POST. Throws a Problem, or an AbortError when the signal ended it.
 */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  const began = performance.now();
  let response, text;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { title: "The server cannot be reached", detail: "It may have ended, or the network is down." });
  }
  const elapsed_ms = performance.now() - began;
  if (!response.ok) throw problemOf(response, text);
  return { answer: JSON.parse(text), elapsed_ms, server_ms: stages(response.headers.get("Server-Timing") ?? "") };
}

function problemOf(response, text) {
  const retryAfter_s = Number(response.headers.get("Retry-After")) || undefined;
  const isProblem = response.headers.get("Content-Type")?.startsWith("application/problem+json");
  const other = { title: `Error ${response.status}`, detail: "Something between here and the server answered in its place." };
  return new Problem(response.status, isProblem ? JSON.parse(text) : other, retryAfter_s);
}

function stages(header) {
  return Object.fromEntries([...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]));
}
