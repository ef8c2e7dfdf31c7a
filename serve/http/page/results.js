/** What the server answered, on the page. */

import { at, make } from "./dom.js";

const whole = (number) => number.toLocaleString("en");

const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);

const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));

/** Labels with bars, for each text. Bars are probabilities, whichever scores are asked for. */
export function showPredictions(predictions, texts, scores) {
  at("predictions").replaceChildren(
    ...predictions.map(({ labels, tokens, truncated }, i) => {
      const list = make("ol", { class: "labels", "aria-label": texts.length > 1 ? `Labels of text ${i + 1}` : "Labels" });
      list.append(...labels.map((label) => row(label, scores)));
      const read = `${whole(tokens)} tokens read${truncated ? "; the rest of the text was cut off" : ""}`;
      const article = make("article", {}, labels.length ? list : make("p", {}, "No label has a score this high."));
      if (texts.length > 1) article.prepend(make("h3", { dir: "auto", title: texts[i] }, texts[i]));
      article.append(make("p", { class: truncated ? "hint cut" : "hint" }, read));
      return article;
    }),
  );
  at("result").hidden = false;
}

function row({ id, name, score }, scores) {
  const share = scores === "logit" ? sigmoid(score) : score;
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  bar.style.width = `${100 * share}%`;
  const label = make("span", { class: "label" }, make("span", { class: "name", dir: "auto" }, name || id));
  if (name && name !== id) label.append(make("span", { class: "id" }, id));
  const shown = scores === "logit" ? score.toFixed(2) : percent(share);
  return make("li", {}, bar, label, make("span", { class: "score" }, shown));
}

const STAGES = [
  ["tokenize", "Tokenizer"],
  ["queue", "Queue"],
  ["encode", "Encoder"],
  ["head", "Scoring all labels"],
];

/** A waterfall of a request: the stages of Server-Timing one after the other, then the rest of the server's time and of all. */
export function showTimes(server_ms, elapsed_ms) {
  const total = server_ms.total ?? 0;
  const parts = STAGES.map(([name, words]) => [name, words, server_ms[name] ?? 0]);
  const staged = parts.reduce((sum, [, , ms]) => sum + ms, 0);
  parts.push(["other", "HTTP and JSON", Math.max(0, total - staged)]);
  parts.push(["network", "Network and browser", Math.max(0, elapsed_ms - Math.max(total, staged))]);
  const all = parts.reduce((sum, [, , ms]) => sum + ms, 0);
  let start = 0;
  const rows = parts.map(([name, words, ms]) => {
    const part = make("span", { class: `part ${name}` });
    part.style.marginInlineStart = `${(100 * start) / all}%`;
    part.style.width = `${(100 * ms) / all}%`;
    start += ms;
    return timeRow(words, part, ms);
  });
  at("times").replaceChildren(...rows, timeRow("Total", "", all));
  at("timing").hidden = false;
}

function timeRow(words, part, ms) {
  const shown = ms < 100 ? ms.toFixed(ms < 10 ? 2 : 1) : whole(Math.round(ms));
  const bar = make("td", { "aria-hidden": "true" }, part);
  return make("tr", {}, make("th", { scope: "row" }, words), bar, make("td", {}, `${shown} ms`));
}

/** The call as JSON and as a command for a shell, which takes the key from its environment. */
export function showExchange(body, answer, withKey) {
  const json = JSON.stringify(body);
  const lines = [
    `curl ${new URL("predict", document.baseURI)}`,
    ...(withKey ? [`-H "Authorization: Bearer $FANIN_API_KEY"`] : []),
    `-H 'Content-Type: application/json'`,
    `-d '${json.replaceAll("'", "'\\''")}'`,
  ];
  at("curl").textContent = lines.join(" \\\n  ");
  at("request").textContent = JSON.stringify(body, null, 2);
  at("response").textContent = JSON.stringify(answer, null, 2);
  at("exchange").hidden = false;
}

/** What /info says of the model. */
export function showModel(info) {
  at("model").textContent = document.title = info.model;
  at("facts").textContent = `${whole(info.labels)} labels, each scored for every text`;
  const test = info.metrics.test ?? {};
  const bytes = Object.values(info.bytes).reduce((sum, size) => sum + size, 0);
  const fanIn = (block) => `${whole(block.fan_in)} of ${whole(info.width)} inputs (${block.connectivity}, ${block.dtype})`;
  const parts = Object.entries(info.bytes).map(([part, count]) => `${part} ${size(count)}`);
  const measured = ["P@1", "P@3", "P@5"].filter((name) => test[name] != null);
  const facts = [
    ["Labels", whole(info.labels)],
    ["Fan-in", info.blocks.map(fanIn)],
    ["Size", `${size(bytes)}: ${parts.join(", ")}`],
    ["Reads", `${whole(info.limits.max_length)} tokens of a text`],
    ["Test", measured.map((name) => `${name} ${test[name].toFixed(3)}`).join(", ")],
    ["Made", new Date(info.created).toLocaleDateString("en", { dateStyle: "long" })],
    ["Version", info.model_version],
  ];
  at("about-list").replaceChildren(
    ...facts
      .filter(([, words]) => words.length)
      .map(([term, words]) => make("div", {}, make("dt", {}, term), ...[words].flat().map((line) => make("dd", {}, line)))),
  );
}

function size(bytes) {
  const unit = Math.min(3, Math.floor(Math.log10(Math.max(1, bytes)) / 3));
  return `${(bytes / 1000 ** unit).toLocaleString("en", { maximumSignificantDigits: 3 })} ${["B", "kB", "MB", "GB"][unit]}`;
}
