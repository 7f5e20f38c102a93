/**
 * The words of an answer that has ended, each with what it drew on.
 *
 * All words together are one stop of the Tab key; the arrow keys move between them, for an answer
 * of hundreds of words must not be hundreds of stops.
 */

import { bar, byId, element, isolated } from "./elements.js";

const MOST_PLACES = 4;
const HIDE_AFTER = 200; // milliseconds in which the pointer may move onto the tip
const POINT_AFTER = 80; // milliseconds, so that a pointer on its way elsewhere points at nothing

/**
 * Replace a streamed text by its tokens.
 *
 * @param {HTMLElement} node has the text.
 * @param {{text: string, sources: object[]}[]} tokens
 * @param {(sources: object[]) => object[]} describe tells where they are, strongest place first.
 * @param {(sources: object[]) => void} onPoint told the sources of the word that is pointed at.
 */
export function showTokens(node, tokens, describe, onPoint) {
  if (tokens.map((token) => token.text).join("") !== node.textContent) return;
  const strongest = Math.max(...tokens.map(strength));
  const words = [];
  const parts = tokens.flatMap((token) => {
    const [, space, text] = /^(\s*)(.*)$/su.exec(token.text);
    if (!text || !token.sources.length) return [token.text];
    const word = element("mark", { class: "word", tabindex: words.length ? -1 : 0 }, text);
    word.style.setProperty("--share", `${(100 * strength(token)) / strongest}%`);
    words.push(word);
    const point = () => {
      words.forEach((each) => (each.tabIndex = each === word ? 0 : -1));
      showTip(word, token.sources, describe);
      onPoint(token.sources);
    };
    word.addEventListener("focus", point);
    word.addEventListener("pointerenter", () => pointSoon(point));
    word.addEventListener("click", () => word.focus());
    word.addEventListener("blur", hideTip);
    word.addEventListener("pointerleave", hideTipSoon);
    return [space, word];
  });
  node.replaceChildren(...parts);
  node.addEventListener("keydown", (event) => moveFocus(event, words));
}

/** Return the share of the source that a token drew most on, 0 to 1. */
const strength = (token) => Math.max(0, ...token.sources.map((source) => source.share));

function moveFocus(event, words) {
  const at = words.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: words.length - 1 }[event.key];
  if (at < 0 || words[to] === undefined) return;
  event.preventDefault();
  words[to].focus();
}

let pointing = 0;
let hiding = 0;
let described = null; // the word that the tip is about

function pointSoon(point) {
  clearTimeout(pointing);
  pointing = setTimeout(point, POINT_AFTER);
}

function showTip(word, sources, describe) {
  clearTimeout(hiding);
  const tip = byId("tip");
  const places = describe(sources);
  const lines = places.slice(0, MOST_PLACES).map(({ number, document, share, excerpt }) =>
    element("li", {},
      element("strong", {}, number === null ? "" : `${number} `, isolated(document)),
      bar("share", share),
      excerpt && element("q", { dir: "auto" },
        excerpt.before, element("mark", {}, excerpt.text), excerpt.after)));
  tip.replaceChildren(element("ul", {}, ...lines));
  if (places.length > MOST_PLACES) tip.append(`and ${places.length - MOST_PLACES} more`);
  tip.hidden = false;
  describedBy(word);
  place();
}

/** Put the tip below the answer, whose words it must not hide; else below or above its word. */
function place() {
  if (!described) return;
  const tip = byId("tip");
  const { offsetWidth: width, offsetHeight: height } = tip;
  const { left, top, bottom } = described.getClientRects()[0];
  const below = [described.parentElement.getBoundingClientRect().bottom, bottom];
  const under = below.find((edge) => edge + height + 8 < innerHeight);
  const rightmost = byId("conversation").getBoundingClientRect().right - width;
  tip.style.left = `${Math.max(8, Math.min(left, rightmost))}px`;
  tip.style.top = `${under === undefined ? Math.max(8, top - height - 4) : under + 4}px`;
}

function describedBy(word) {
  described?.removeAttribute("aria-describedby");
  word?.setAttribute("aria-describedby", "tip");
  described = word;
}

export function hideTip() {
  clearTimeout(hiding);
  byId("tip").hidden = true;
  describedBy(null);
}

function hideTipSoon() {
  clearTimeout(pointing);
  clearTimeout(hiding);
  hiding = setTimeout(hideTip, HIDE_AFTER);
}

byId("tip").addEventListener("pointerenter", () => clearTimeout(hiding));
byId("tip").addEventListener("pointerleave", hideTipSoon);
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
byId("conversation").addEventListener("scroll", place, { passive: true });
addEventListener("resize", place);
