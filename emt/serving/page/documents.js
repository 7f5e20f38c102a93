/** The list of documents, a page at a time: searched, filtered, read, asked, removed; and figures. */

import { listDocuments, removeDocument, store } from "./api.js";
import { byId, counted, element, isolated, notice, size } from "./elements.js";
import { Pairs } from "./pairs.js";

const PAGE = 50; // documents
const WAIT = 200; // milliseconds without a key typed, before names are searched

export class Documents {
  #callbacks;
  #where = new Pairs(byId("list-where"), "Only with", () => this.refresh());
  #listing = new AbortController();
  #last = null; // the name that the next page begins after

  /** @param {{read, toggle, forget}} callbacks each is given the name of a document. */
  constructor(callbacks) {
    this.#callbacks = callbacks;
    let typing = 0;
    byId("list-query").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => this.refresh(), WAIT);
    });
    byId("list-form").addEventListener("submit", (event) => event.preventDefault());
    byId("more").addEventListener("click", () => this.#more());
  }

  /** List from the start, and tell the store's figures anew. */
  async refresh() {
    this.#last = null;
    const signal = this.#begin();
    await Promise.all([this.#list(signal), showFigures(signal)]);
  }

  async #more() {
    const list = byId("list");
    const numShown = list.childElementCount;
    await this.#list(this.#begin());
    list.children[numShown]?.querySelector("button").focus();
  }

  /** Return a signal for what is fetched from now on; answers to older requests are of the past. */
  #begin() {
    this.#listing.abort();
    this.#listing = new AbortController();
    return this.#listing.signal;
  }

  async #list(signal) {
    const isFirst = this.#last === null;
    const query = byId("list-query").value;
    try {
      const page = await listDocuments(
        { query, where: this.#where.where(), after: this.#last, limit: PAGE, signal });
      const rows = page.data.map((document) => this.#row(document));
      if (isFirst) byId("list").replaceChildren(...rows);
      else byId("list").append(...rows);
      this.#last = page.data.at(-1)?.name ?? this.#last;
      byId("more").hidden = !page.has_more;
      this.#showCount(page.has_more, query);
    } catch (error) {
      if (signal.aborted) return;
      if (isFirst) byId("list").replaceChildren();
      byId("more").hidden = true;
      byId("list-status").textContent = error.message;
    }
  }

  #showCount(hasMore, query) {
    const numShown = byId("list").childElementCount;
    const isSearch = query || this.#where.pairs.length;
    byId("list-status").textContent = numShown
      ? counted(numShown, "document") + (hasMore ? ", and more" : "")
      : isSearch
        ? "No document is like this."
        : "No documents yet.";
  }

  #row({ name, num_tokens, num_characters, metadata }) {
    const read = element("button", { type: "button", class: "name", "aria-label": `Read ${name}`,
      click: () => this.#callbacks.read(name) }, isolated(name));
    const ask = element("button", { type: "button", class: "quiet", "aria-label": `Ask only ${name}`,
      click: () => this.#callbacks.toggle(name) }, "Ask only this");
    const remove = element("button", { type: "button", class: "quiet remove", "aria-label": `Remove ${name}`,
      click: () => this.#remove(name) }, "Remove");
    const chips = Object.entries(metadata ?? {}).map(([key, value]) =>
      element("button", { type: "button", "aria-label": `Show only ${key}=${value}`,
        click: () => this.#where.add(key, String(value)) }, isolated(`${key}=${value}`)));
    const length = num_characters === null ? "" : `, ${counted(num_characters, "character")}`;
    return element("li", {}, read,
      element("span", { class: "muted" }, `${counted(num_tokens, "token")}${length}`),
      element("span", { class: "chips" }, ...chips),
      element("span", { class: "actions" }, ask, remove));
  }

  /** Remove a document, if the user says so once more. */
  #remove(name) {
    const dialog = byId("remove-dialog");
    byId("remove-name").textContent = name;
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.addEventListener("close", async () => {
      if (dialog.returnValue !== "remove") return;
      try {
        await removeDocument(name);
        this.#callbacks.forget(name);
      } catch (error) {
        notice(error.message);
      }
      await this.refresh();
      byId("list-status").textContent = `Removed. ${byId("list-status").textContent}`;
      byId("list-query").focus();
    }, { once: true });
  }
}

/** Show the figures of the store, the most telling ones in the page's header. */
async function showFigures(signal) {
  try {
    const { can_write: canWrite, ...figures } = await store(signal);
    document.body.classList.toggle("read-only", !canWrite);
    byId("summary").textContent =
      `${counted(figures.num_documents, "document")}, ${counted(figures.num_tokens, "token")}`;
    byId("figures").replaceChildren(
      ...flat(figures).flatMap(([key, value]) => [
        element("dt", {}, key), element("dd", {}, isolated(value))]));
  } catch (error) {
    if (!signal.aborted) notice(error.message);
  }
}

/** Return the figures as pairs of texts; what is nested is named by both names. */
function flat(figures, path = []) {
  return Object.entries(figures).flatMap(([key, value]) => {
    if (key === "object" || value === null) return [];
    const names = [...path, key.replaceAll("_", " ")];
    if (typeof value === "object") return flat(value, names);
    const isSize = names.some((name) => /\bbytes\b/.test(name));
    const text = typeof value !== "number" ? String(value)
      : isSize ? size(value) : value.toLocaleString("en");
    return [[names.join(" "), text]];
  });
}
