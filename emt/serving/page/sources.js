/** The passages of one answer, with their scores and shares, and the document that is read beside. */

import { bar, byId, element, isolated } from "./elements.js";
import { Reader } from "./reader.js";
import { around } from "./spans.js";

export class Sources {
  #reader = new Reader();
  #turn = null;
  #cards = [];

  constructor() {
    byId("close-sources").addEventListener("click", () => this.close());
  }

  /** Show what an answer drew on, and its first passage in its document. */
  show(turn) {
    if (turn === this.#turn) return;
    this.#turn = turn;
    this.#cards = turn.passages.map((passage, index) => this.#card(passage, index));
    byId("passage-list").replaceChildren(...this.#cards);
    const none = byId("no-passages");
    none.hidden = this.#cards.length > 0;
    byId("legend").hidden = !none.hidden;
    none.textContent = turn.usesMemory
      ? "Nothing relevant in the memory."
      : "The memory was not used for this answer.";
    const [best] = turn.passages;
    if (best) this.#read(turn.quotes.find((quote) => overlaps(quote, best)) ?? best);
  }

  /** Show the sources of a word: which passages have them, and the first one in its document. */
  point(turn, sources) {
    this.show(turn);
    for (const [index, card] of this.#cards.entries()) {
      const share = sources
        .filter((source) => overlaps(source, turn.passages[index]))
        .reduce((sum, source) => sum + source.share, 0);
      card.classList.toggle("pointed", share > 0);
    }
    const card = this.#cards.find((each) => each.classList.contains("pointed"));
    card?.scrollIntoView({ block: "nearest" });
    this.#read(sources[0], sources);
  }

  /** Tell in which passages the sources of a word are, in the server's order, each with a text. */
  describe(turn, sources) {
    const places = new Map();
    for (const source of sources) {
      const index = turn.passages.findIndex((passage) => overlaps(source, passage));
      const id = index < 0 ? source.document : index;
      const place = places.get(id) ?? {
        number: index < 0 ? null : index + 1, document: source.document, share: 0, excerpt: null };
      place.share += source.share;
      place.excerpt ??= excerptOf(turn.passages[index], source);
      places.set(id, place);
    }
    return [...places.values()];
  }

  /** Show a document from its start, with no answer's passages in it. */
  read(name) {
    this.open();
    return this.#reader.open(name, null, []);
  }

  /** A document was written or removed: what is shown of it is of the past. */
  forget(name) {
    this.#reader.forget(name);
  }

  /** Come in front, where there is no room beside the answer. */
  open() {
    byId("sources").classList.add("open");
  }

  close() {
    byId("sources").classList.remove("open");
  }

  #card(passage, index) {
    const quotes = this.#turn.quotes.filter((quote) => overlaps(quote, passage));
    const title = element(
      "button",
      { type: "button", class: "name", "aria-label": `Read passage ${index + 1} in ${passage.document}`,
        click: () => this.#read(passage) },
      `${index + 1} `, isolated(passage.document),
    );
    const bars = element("p", { class: "bars" },
      bar("score", passage.score), bar("copied", passage.copied), bar("share", passage.share));
    const lines = quotes.map((quote) =>
      element("li", {}, element("q", { dir: "auto" }, quote.quote),
        element("span", { class: "bars" }, bar("copied", quote.copied), bar("share", quote.share))));
    return element("li", { class: "card" }, title, bars,
      lines.length ? element("ul", { "aria-label": "Quotes" }, ...lines)
        : element("p", { class: "excerpt", dir: "auto" }, passage.text));
  }

  /** Show where something stands in its document, with everything that the answer has there. */
  #read(place, pointed = []) {
    const of = (spans, kind) =>
      spans
        .filter((span) => span.document === place.document && span.start !== null)
        .map(({ start, end }) => ({ start, end, kind }));
    this.#reader.open(place.document, place.start === null ? null : place, [
      ...of(this.#turn.passages, "passage"),
      ...of(this.#turn.quotes, "quote"),
      ...of(pointed, "pointed"),
    ], place.text);
  }
}

/** A sentence may begin before the passage that it is quoted from, and a place may be empty. */
const overlaps = (span, passage) =>
  span.document === passage.document &&
  (passage.start === null || (span.start < passage.end && span.end > passage.start));

/** Return a source with what stands around it in its passage; null where there is no text of it. */
function excerptOf(passage, source) {
  if (!passage || passage.start === null || source.start === source.end) return null;
  return around(passage.text, source.start - passage.start, source.end - passage.start);
}
