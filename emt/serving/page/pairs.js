/** A field for metadata, KEY=VALUE one after another, each of which can be taken away again. */

import { element, isolated } from "./elements.js";

/** Add the field to the page. `pairs` are those that are in force. */
export class Pairs {
  pairs = []; // [key, text of the value]
  #chips = element("span", { class: "chips" });
  #field = element("input", { placeholder: "key=value", autocomplete: "off" });
  #onChange;

  constructor(parent, label, onChange = () => {}) {
    this.#onChange = onChange;
    const add = element("button", { type: "button", class: "quiet", click: () => this.#take() }, "Add");
    this.#field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // it stands in other forms, which must not be sent
      this.#take();
    });
    this.#field.addEventListener("input", () => this.#field.setCustomValidity(""));
    parent.append(element("label", {}, `${label} `, this.#field), add, this.#chips);
  }

  /** Add a pair, unless it is there. */
  add(key, text) {
    if (!this.pairs.some(([aKey, aText]) => aKey === key && aText === text)) {
      this.pairs.push([key, text]);
    }
    this.#changed();
  }

  /** Return the filter: for each key the values of which any will do. */
  where() {
    const where = Object.create(null); // in which every key is a key, "__proto__" too
    for (const [key, text] of this.pairs) (where[key] ??= []).push(...meanings(text));
    return where;
  }

  /** Return metadata of a document; a value that looks like a number is one. */
  metadata() {
    return Object.fromEntries(this.pairs.map(([key, text]) => [key, meanings(text).at(-1)]));
  }

  /** Take what is in the field, also where nobody has pressed Enter. */
  #take() {
    const [, key, text] = /^([^=]*)=(.*)$/s.exec(this.#field.value) ?? [];
    if (!key?.trim()) {
      this.#field.setCustomValidity("Write KEY=VALUE, such as year=1999.");
      this.#field.reportValidity();
      return;
    }
    this.#field.value = "";
    this.add(key.trim(), text.trim());
  }

  #changed() {
    this.#chips.replaceChildren(
      ...this.pairs.map((pair) => {
        const text = `${pair[0]}=${pair[1]}`;
        const remove = () => {
          this.pairs = this.pairs.filter((each) => each !== pair);
          this.#changed();
          this.#field.focus();
        };
        return element("button", { type: "button", "aria-label": `Take away ${text}`, click: remove },
          isolated(text), " ×");
      }),
    );
    this.#onChange();
  }
}

/** Return what a text may mean: itself, and the number or truth value that it looks like. */
function meanings(text) {
  const isNumber = /^-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?$/.test(text);
  if (isNumber && Number.isFinite(Number(text))) return [text, Number(text)];
  return text === "true" || text === "false" ? [text, text === "true"] : [text];
}
