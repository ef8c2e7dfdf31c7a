/** A set of labels, chosen by typing: the WAI-ARIA combobox pattern, list autocomplete with manual selection. */

import { ask } from "./api.js";
import { at, debounce, make, say } from "./dom.js";

const SHOWN = 8;

export class LabelPicker {
  #chosen = new Map(); // id → name
  #found = []; // the labels in the list
  #active = -1; // the one in it that Enter takes
  #name;
  #changed;
  #failed;
  #search;
  #newest; // AbortController of the newest search
  #unknown; // what Enter found to be no id

  /** In the elements whose ids begin with `name`. Calls `changed` after each change by hand, `failed` with each Problem. */
  constructor(name, { changed, failed }) {
    this.#name = name;
    this.#changed = changed;
    this.#failed = failed;
    this.#search = debounce(120, () => this.#lookUp(`query=${encodeURIComponent(this.#typed)}&limit=${SHOWN}`));
    this.#input.addEventListener("input", () => {
      this.#close();
      if (this.#typed) this.#search();
    });
    this.#input.addEventListener("keydown", (event) => this.#onKey(event));
    this.#input.addEventListener("blur", () => this.#close());
    this.#list.addEventListener("pointerdown", (event) => event.preventDefault()); // the focus stays in the input
    this.#list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.#choose(this.#found[[...this.#list.children].indexOf(option)]);
    });
  }

  get ids() {
    return [...this.#chosen.keys()];
  }

  /** Sets the labels by their ids, which stand for their names until these are looked up. */
  set ids(ids) {
    this.#chosen = new Map(ids.map((id) => [id, id]));
    this.#show();
  }

  async lookUpNames() {
    for (const id of this.ids) {
      const label = await this.#byId(id, () => {});
      if (label && this.#chosen.has(id)) this.#chosen.set(id, label.name);
    }
    this.#show();
  }

  get #input() {
    return at(`${this.#name}-input`);
  }

  get #list() {
    return at(`${this.#name}-list`);
  }

  get #typed() {
    return this.#input.value.trim();
  }

  #note(words) {
    at(`${this.#name}-note`).textContent = words;
    say(words);
  }

  async #ask(query, failed, signal) {
    try {
      return (await ask(`labels?${query}`, { signal })).answer.labels;
    } catch (error) {
      if (error.name !== "AbortError") failed(error);
      return [];
    }
  }

  async #byId(id, failed) {
    const labels = await this.#ask(`ids=${encodeURIComponent(id)}`, failed);
    return labels.find((label) => label.id === id); // a comma in it would have asked for several
  }

  async #lookUp(query) {
    this.#newest?.abort();
    const { signal } = (this.#newest = new AbortController());
    const labels = await this.#ask(query, this.#failed, signal);
    if (signal.aborted) return;
    this.#found = labels.filter(({ id }) => !this.#chosen.has(id));
    this.#list.replaceChildren(
      ...this.#found.map(({ id, name }, i) =>
        make("li", { role: "option", id: `${this.#name}-option-${i}`, "aria-selected": "false" }, ...this.#words(id, name)),
      ),
    );
    this.#list.hidden = !this.#found.length;
    this.#input.ariaExpanded = String(!this.#list.hidden);
    this.#noteFound();
  }

  #noteFound() {
    const count = this.#found.length;
    if (count) this.#note(`${count}${count === SHOWN ? " or more" : ""} found: choose with the arrow keys and Enter`);
    else if (this.#typed === this.#unknown) this.#note("No label has this name or id.");
    else this.#note("No name has this. If it is an id, press Enter.");
  }

  #words(id, name) {
    const words = [make("span", { class: "name", dir: "auto" }, name || id)];
    if (name && name !== id) words.push(" ", make("span", { class: "id" }, id)); // names need not differ
    return words;
  }

  #close() {
    this.#newest?.abort();
    this.#search.cancel();
    this.#found = [];
    this.#list.replaceChildren();
    this.#list.hidden = true;
    this.#input.ariaExpanded = "false";
    this.#note("");
    this.#activate(-1);
  }

  #activate(position) {
    this.#list.children[this.#active]?.setAttribute("aria-selected", "false");
    this.#active = position;
    const option = this.#list.children[position];
    option?.setAttribute("aria-selected", "true");
    option?.scrollIntoView({ block: "nearest" });
    if (option) this.#input.setAttribute("aria-activedescendant", option.id);
    else this.#input.removeAttribute("aria-activedescendant");
  }

  #onKey(event) {
    const count = this.#found.length;
    if (event.isComposing) return;
    if (event.key === "ArrowDown" && count) this.#activate((this.#active + 1) % count);
    else if (event.key === "ArrowUp" && count) this.#activate(this.#active > 0 ? this.#active - 1 : count - 1);
    else if (event.key === "Enter") this.#onEnter();
    else if (event.key === "Escape") {
      if (this.#list.hidden) this.#input.value = "";
      this.#close();
    } else if (event.key === "Backspace" && !this.#input.value && this.#chosen.size) this.#remove(this.ids.at(-1));
    else return;
    event.preventDefault();
  }

  async #onEnter() {
    if (this.#active >= 0) return this.#choose(this.#found[this.#active]);
    const id = this.#typed;
    if (!id) return;
    const label = await this.#byId(id, (error) => {
      if (error.status !== 404) return this.#failed(error);
      this.#unknown = id;
      this.#noteFound();
    });
    if (label) this.#choose(label);
  }

  #choose({ id, name }) {
    this.#chosen.set(id, name);
    this.#input.value = "";
    this.#close();
    this.#show();
    this.#note(`${name || id} added`);
    this.#changed();
  }

  #remove(id) {
    this.#note(`${this.#chosen.get(id) || id} removed`);
    this.#chosen.delete(id);
    this.#show();
    this.#input.focus(); // the button that had it is gone
    this.#changed();
  }

  #show() {
    const chips = [...this.#chosen].map(([id, name]) => {
      const button = make("button", { type: "button" }, make("span", { class: "unseen" }, "Remove "), ...this.#words(id, name));
      button.addEventListener("click", () => this.#remove(id));
      return make("li", {}, button);
    });
    at(`${this.#name}-chips`).replaceChildren(...chips);
  }
}
