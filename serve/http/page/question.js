/** What is asked: the form, as a request of the API and as the part of the address after the #. */

import { at } from "./dom.js";

const usualTopK = () => Math.min(10, at("top_k").max); // fewer, if the model has no more
const scores = () => document.querySelector("[name=scores]:checked").value;

export function texts() {
  const value = at("text").value;
  return (at("lines").checked ? value.split("\n") : [value]).filter((text) => text.trim());
}

/** The body of POST /predict. Labels only appear in it when some are chosen. */
export function request(allow, deny) {
  const inputs = at("lines").checked ? texts() : at("text").value;
  const body = { inputs, top_k: at("top_k").valueAsNumber, scores: scores() };
  const least = at("min_score").valueAsNumber;
  if (!Number.isNaN(least)) body.min_score = scores() === "probability" ? least / 100 : least;
  if (allow.ids.length) (body.labels ??= {}).allow = allow.ids;
  if (deny.ids.length) (body.labels ??= {}).deny = deny.ids;
  return body;
}

/** How many settings in the folded part differ from what they are at first. */
export function changedOptions(allow, deny) {
  const changed = [
    at("top_k").valueAsNumber !== usualTopK(),
    at("min_score").value,
    scores() === "logit",
    allow.ids.length,
    deny.ids.length,
  ];
  return changed.filter(Boolean).length;
}

/** After a change of the unit: the lowest score that leaves out the same labels. */
export function convertLowestScore() {
  const least = at("min_score").valueAsNumber;
  const logit = scores() === "logit";
  at("min_score-unit").textContent = logit ? "as logit" : "in %";
  if (Number.isNaN(least)) return;
  const converted = logit ? Math.log(least / (100 - least)) : 100 / (1 + Math.exp(-least));
  at("min_score").value = Number.isFinite(converted) ? Number(converted.toPrecision(4)) : "";
}

/** Puts the question into the address, without what is as it is at first. */
export function toAddress(allow, deny) {
  const pairs = [
    ["text", at("text").value],
    ["lines", at("lines").checked ? "1" : ""],
    ["top_k", at("top_k").valueAsNumber === usualTopK() ? "" : at("top_k").value],
    ["scores", scores() === "logit" ? "logit" : ""],
    ["min_score", at("min_score").value],
    ...allow.ids.map((id) => ["allow", id]),
    ...deny.ids.map((id) => ["deny", id]),
  ];
  const address = String(new URLSearchParams(pairs.filter(([, value]) => value)));
  history.replaceState(null, "", location.pathname + location.search + (address && `#${address}`));
}

/** Fills the form from the address. */
export function fromAddress(allow, deny) {
  const address = new URLSearchParams(location.hash.slice(1));
  at("text").value = address.get("text") ?? "";
  at("lines").checked = address.has("lines");
  at("top_k").value = address.get("top_k") ?? "10";
  document.querySelector(`[name=scores][value=${address.get("scores") === "logit" ? "logit" : "probability"}]`).checked = true;
  convertLowestScore();
  at("min_score").value = address.get("min_score") ?? "";
  allow.ids = address.getAll("allow");
  deny.ids = address.getAll("deny");
}
