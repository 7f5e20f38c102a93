/**
 * A document, of which only the text around what is shown is fetched and kept.
 *
 * The text is cut into pieces of one length. A few pieces that follow each other are in the page;
 * scrolling to an end of them fetches the next one and drops the one farthest away.
 */

import { ApiError, readDocument } from "./api.js";
import { byId, counted, element, notice } from "./elements.js";
import { cut } from "./spans.js";

const PIECE = 4000; // characters
const MOST_PIECES = 6;
const NEAR = 800; // pixels from an end at which the next piece is fetched

export class Reader {
  #text = byId("reader-text");
  #jump = byId("reader-jump");
  #name = null;
  #length = 0; // characters
  #pieces = new Map(); // number -> its characters; the numbers follow each other
  #marks = [];
  #opening = new AbortController();
  #isGrowing = false;

  constructor() {
    this.#text.addEventListener("scroll", () => this.#grow(), { passive: true });
    this.#jump.addEventListener("change", () => this.#go(Number(this.#jump.value) * PIECE));
  }

  /**
   * Show a document at a place, with marks in its text.
   *
   * @param {{start: number}|null} place null for the start of the document.
   * @param {{start: number, end: number, kind: string}[]} marks
   * @param {string} [excerpt] shown where the text cannot be read.
   */
  async open(name, place, marks, excerpt = "") {
    this.#marks = marks;
    const at = place?.start ?? 0;
    if (name === this.#name && this.#pieces.has(Math.floor(at / PIECE))) {
      this.#begin();
      this.#render();
      this.#scrollTo(at);
      return;
    }
    if (name !== this.#name) {
      this.#name = name;
      this.#pieces.clear();
      byId("reader-title").replaceChildren(element("bdi", {}, name));
      byId("reader").hidden = false;
    }
    await this.#go(at, excerpt);
  }

  /** Close a document that was written anew or removed. */
  forget(name) {
    if (name !== this.#name) return;
    this.#begin();
    this.#name = null;
    this.#pieces.clear();
    this.#text.replaceChildren();
    byId("reader").hidden = true;
  }

  /** Fetch the pieces around a character, show them, and scroll to it. */
  async #go(at, excerpt = "") {
    const signal = this.#begin();
    const number = Math.floor(at / PIECE);
    this.#text.setAttribute("aria-busy", "true");
    try {
      const pieces = await this.#fetch(Math.max(number - 1, 0), number + 2, signal);
      this.#pieces = pieces;
      this.#render();
      this.#scrollTo(at);
      this.#jump.value = number;
    } catch (error) {
      if (signal.aborted) return;
      this.#pieces.clear();
      this.#text.textContent = excerpt;
      byId("reader-place").textContent = excerpt ? "of this document, only the passage" : "";
      byId("reader-jump-label").hidden = true;
      if (!excerpt) notice(error.message);
    }
    this.#text.removeAttribute("aria-busy");
    this.#grow();
  }

  /** Return a signal for what is fetched from now on; what is under way is of no use any more. */
  #begin() {
    this.#opening.abort();
    this.#opening = new AbortController();
    this.#text.removeAttribute("aria-busy");
    return this.#opening.signal;
  }

  /** Return the pieces from number `first` up to `stop`, those that the document has. */
  async #fetch(first, stop, signal) {
    const found = await readDocument(this.#name, first * PIECE, stop * PIECE, signal);
    if (found.text === null) throw new ApiError("This document was written as token ids.", 0);
    const characters = [...found.text];
    this.#length = found.num_characters ?? characters.length;
    const pieces = new Map();
    for (let number = first; number * PIECE < first * PIECE + characters.length; number++) {
      const from = (number - first) * PIECE;
      pieces.set(number, characters.slice(from, from + PIECE));
    }
    return pieces;
  }

  /** Fetch the next piece at the end that is nearly scrolled to, and drop what is far away. */
  async #grow() {
    const { scrollTop, clientHeight, scrollHeight } = this.#text;
    const numbers = [...this.#pieces.keys()];
    if (this.#isGrowing || !numbers.length) return;
    const isAtEnd = scrollHeight - scrollTop - clientHeight < NEAR;
    const next = isAtEnd ? Math.max(...numbers) + 1 : Math.min(...numbers) - 1;
    const isThere = next >= 0 && next * PIECE < this.#length;
    if (!isThere || !(isAtEnd || scrollTop < NEAR)) return;
    const signal = this.#opening.signal;
    this.#isGrowing = true;
    try {
      const grown = await this.#fetch(next, next + 1, signal);
      if (signal.aborted) return;
      this.#replace(grown, isAtEnd);
      this.#jump.value = next;
    } catch (error) {
      if (!signal.aborted) notice(error.message);
    } finally {
      this.#isGrowing = false;
    }
  }

  /** Add pieces at an end; what is read stays where it is on the screen. */
  #replace(grown, isAtEnd) {
    const pieces = [...this.#pieces, ...grown].sort(([a], [b]) => a - b);
    const kept = isAtEnd ? pieces.slice(-MOST_PIECES) : pieces.slice(0, MOST_PIECES);
    const anchor = [...this.#pieces.keys()].find((number) =>
      kept.some(([each]) => each === number) && this.#bottomOf(number) > 0);
    const before = this.#bottomOf(anchor);
    this.#pieces = new Map(kept);
    this.#render();
    this.#text.scrollTop += this.#bottomOf(anchor) - before;
  }

  /** Return where a piece ends, in pixels below the top of what is seen. */
  #bottomOf(number) {
    const node = this.#text.querySelector(`[data-piece="${number}"]`);
    return node.getBoundingClientRect().bottom - this.#text.getBoundingClientRect().top;
  }

  #render() {
    const nodes = [...this.#pieces].map(([number, characters]) => {
      const parts = cut(characters, number * PIECE, this.#marks).map(({ text, start, kinds }) =>
        kinds.length ? element("mark", { class: kinds.join(" "), "data-start": start }, text) : text);
      return element("span", { "data-piece": number }, ...parts);
    });
    const { scrollTop } = this.#text;
    this.#text.replaceChildren(...nodes);
    this.#text.scrollTop = scrollTop;
    this.#showPlace();
  }

  #showPlace() {
    const numbers = [...this.#pieces.keys()];
    const first = numbers.length ? Math.min(...numbers) : 0;
    const stop = Math.min((Math.max(0, ...numbers) + 1) * PIECE, this.#length);
    const isWhole = first === 0 && stop === this.#length;
    byId("reader-place").textContent = isWhole
      ? counted(this.#length, "character")
      : `characters ${(first * PIECE).toLocaleString("en")} to ${stop.toLocaleString("en")} ` +
        `of ${this.#length.toLocaleString("en")}`;
    byId("reader-jump-label").hidden = this.#length <= MOST_PIECES * PIECE;
    this.#jump.max = Math.max(Math.ceil(this.#length / PIECE) - 1, 0);
  }

  /** Bring the marks that begin at a character, or the character's piece, into the middle. */
  #scrollTo(at) {
    const node =
      this.#text.querySelector(`[data-start="${at}"]`) ??
      this.#text.querySelector(`[data-piece="${Math.floor(at / PIECE)}"]`);
    if (!node) return;
    const [box, frame] = [node.getClientRects()[0], this.#text.getBoundingClientRect()];
    if (!box) return;
    this.#text.scrollTop += box.top - frame.top - (at ? frame.height / 3 : 0);
  }
}
