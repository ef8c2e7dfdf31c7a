/** Errors in words, each with the field that it is about. */

import { at, make } from "./dom.js";

const TITLES = {
  413: "That is too much text",
  422: "The server does not take this",
  429: "The server is busy",
  503: "No predictions are taken now",
  504: "It took too long",
};
const FIELDS = [
  // pointers into the request, and the control each stands for
  ["/inputs", "text", "Text"],
  ["/top_k", "top_k", "Labels for each text"],
  ["/min_score", "min_score", "Lowest score"],
  ["/labels/allow", "allow-input", "Only these labels"],
  ["/labels/deny", "deny-input", "Never these labels"],
];

const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}${/[.!?…]$/.test(words) ? "" : "."}`;

export function hideProblem() {
  at("problem").hidden = true;
  for (const [, id] of FIELDS) at(id).removeAttribute("aria-invalid");
}

/** Shows a Problem; `again_s` says when the page asks again by itself. */
export function showProblem(problem, again_s) {
  hideProblem();
  const parts = [make("h2", {}, TITLES[problem.status] ?? problem.title)];
  if (problem.errors.length) parts.push(make("ul", {}, ...problem.errors.map(fault)));
  else parts.push(make("p", {}, sentence(problem.message)));
  if (again_s) parts.push(make("p", {}, `Asking again in ${again_s} s.`));
  if (problem.request_id) parts.push(make("p", { class: "id" }, `Request ${problem.request_id}`));
  at("problem").replaceChildren(...parts);
  at("problem").classList.toggle("wait", Boolean(again_s));
  at("problem").hidden = false;
}

function fault({ pointer, detail }) {
  const field = FIELDS.find(([start]) => pointer === start || pointer.startsWith(`${start}/`));
  if (!field) return make("li", {}, make("code", {}, pointer), `: ${detail}`);
  const [start, id, words] = field;
  const item = pointer.slice(start.length + 1); // its number, of texts or labels
  at(id).setAttribute("aria-invalid", "true");
  const link = make("button", { type: "button", class: "quiet" }, item ? `${words} ${Number(item) + 1}` : words);
  link.addEventListener("click", () => {
    const folded = at(id).closest("details");
    if (folded) folded.open = true;
    at(id).focus();
  });
  return make("li", {}, link, `: ${detail} `, make("code", {}, pointer));
}
