/** The page: asks when something changes or somebody says so, and shows what comes back. */

import { ask, key, Problem } from "./api.js";
import { at, debounce, make, say } from "./dom.js";
import { LabelPicker } from "./picker.js";
import { hideProblem, showProblem } from "./problem.js";
import { changedOptions, convertLowestScore, fromAddress, request, texts, toAddress } from "./question.js";
import { showExchange, showModel, showPredictions, showTimes } from "./results.js";

const EXAMPLES = 4;
const LONGEST_WAIT_S = 30;
const ANSWER = [at("result"), at("timing"), at("exchange")];

const pickers = { changed: () => predict(), failed: (problem) => show(problem) };
const filters = [new LabelPicker("allow", pickers), new LabelPicker("deny", pickers)];

let model; // what /info said; without it nothing is asked
let underWay; // AbortController of the newest prediction
let asksAgain; // timer of what is tried again by itself
let failures = 0; // in a row, each of which was worth another try

/** Ends what is under way; the signal of what comes instead. */
function begin() {
  soon.cancel();
  clearTimeout(asksAgain);
  underWay?.abort();
  underWay = new AbortController();
  return underWay.signal;
}

async function load() {
  const signal = begin();
  try {
    await describe(signal);
  } catch (error) {
    return show(error, load);
  }
  failures = 0;
  hideProblem();
  at("forget").hidden = !key.get();
  at("top_k").max = Math.min(50, model.labels, model.limits.max_top_k);
  for (const filter of filters) filter.lookUpNames();
  showExamples();
  predict();
}

async function describe(signal) {
  model = (await ask("info", { signal })).answer;
  showModel(model);
  at("about").hidden = false;
}

async function predict() {
  if (!model) return load();
  const signal = begin();
  showSettings();
  toAddress(...filters);
  const asked = texts();
  if (!asked.length) return clear();
  busy(true);
  const body = request(...filters);
  try {
    const { answer, elapsed_ms, server_ms } = await ask("predict", { body, signal });
    failures = 0;
    hideProblem();
    showPredictions(answer.predictions, asked, body.scores);
    showTimes(server_ms, elapsed_ms);
    showExchange(body, answer, Boolean(key.get()));
    say(summary(answer.predictions));
    if (answer.model_version !== model.model_version) await describe(signal); // the server has another model by now
  } catch (error) {
    show(error, predict);
    if (error.request_id) showExchange(body, error.body, Boolean(key.get()));
  }
  if (!signal.aborted) busy(false);
}

function summary(predictions) {
  const best = predictions[0].labels[0];
  const count = predictions.reduce((sum, { labels }) => sum + labels.length, 0);
  const found = `${count} label${count === 1 ? "" : "s"}`;
  if (predictions.length > 1) return `${found} for ${predictions.length} texts`;
  return best ? `${found}, the best is ${best.name || best.id}` : found;
}

/** Shows a Problem. If it is of the moment, `again` is called when the server says, or later each time. */
function show(problem, again) {
  if (problem.name === "AbortError") return; // something later has taken over
  if (!(problem instanceof Problem)) throw problem;
  if (problem.status === 401) return askForKey(problem);
  const wait_s = again && problem.retryAfter_s && Math.max(problem.retryAfter_s, Math.min(LONGEST_WAIT_S, 2 ** failures++));
  if (wait_s) asksAgain = setTimeout(again, 1000 * wait_s);
  for (const part of ANSWER) part.hidden = true;
  showProblem(problem, wait_s);
}

function askForKey(problem) {
  at("key-form").hidden = false;
  if (key.get()) showProblem(problem); // it had one, and the server does not know it
  at("key").focus();
}

function busy(is) {
  at("go").ariaDisabled = is ? "true" : null;
  at("result").ariaBusy = is ? "true" : null;
}

function clear() {
  busy(false);
  hideProblem();
  for (const part of ANSWER) part.hidden = true;
}

function showSettings() {
  at("top_k-shown").value = at("top_k").value;
  const changed = changedOptions(...filters);
  at("options-count").textContent = changed ? `(${changed} changed)` : "";
}

/** Names of labels as texts to begin with: the only texts that are known to suit any model. */
async function showExamples() {
  let labels;
  try {
    ({ labels } = (await ask("labels?query=%20&limit=200")).answer); // names of several words
  } catch (error) {
    if (error.status === 401) askForKey(error);
    return; // it goes without
  }
  const names = [...new Set(labels.map(({ name }) => name))].filter((name) => name.length <= 44);
  const some = names.filter((_, i) => i % Math.ceil(names.length / EXAMPLES) === 0);
  at("examples").querySelector("ul").replaceChildren(
    ...some.map((name) => {
      const button = make("button", { type: "button", dir: "auto" }, name);
      button.addEventListener("click", () => {
        at("text").value = name;
        predict();
      });
      return make("li", {}, button);
    }),
  );
  at("examples").hidden = !some.length;
}

async function copy(button) {
  const { copy: what } = button.dataset;
  const text = what === "link" ? location.href : at(what).textContent;
  const words = button.textContent;
  try {
    await navigator.clipboard.writeText(text); // only on https and on localhost
    button.textContent = "Copied";
  } catch {
    if (what !== "link") getSelection().selectAllChildren(at(what));
    button.textContent = what === "link" ? "Copy it from the address bar" : "Selected: press Ctrl + C";
  }
  say(button.textContent);
  setTimeout(() => (button.textContent = words), 2000);
}

const soon = debounce(300, predict);

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (texts().length) predict();
  else {
    clear();
    showProblem(new Problem(422, { detail: "", errors: [{ pointer: "/inputs", detail: "the text is empty" }] }));
  }
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("text").addEventListener("input", () => at("live").checked && soon());
at("top_k").addEventListener("input", () => {
  showSettings();
  soon();
});
at("min_score").addEventListener("input", soon);
at("lines").addEventListener("change", predict);
for (const radio of document.querySelectorAll("[name=scores]")) {
  radio.addEventListener("change", () => {
    convertLowestScore();
    predict();
  });
}
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value);
  at("key").value = "";
  at("key-form").hidden = true;
  hideProblem();
  at("text").focus();
  load();
});
at("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
addEventListener("hashchange", () => {
  fromAddress(...filters);
  load();
});

fromAddress(...filters);
at("options").open = matchMedia("(min-width: 60rem)").matches || changedOptions(...filters) > 0;
showSettings();
load();
