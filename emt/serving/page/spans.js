/**
 * Spans of characters. The server counts characters (code points), JavaScript's strings count
 * UTF-16 units; so texts are cut as arrays of characters.
 */

const AROUND = 40; // characters on each side

/** Return some characters of a text, and what stands before and after them. */
export function around(text, start, end) {
  const characters = [...text];
  const before = characters.slice(Math.max(start - AROUND, 0), start).join("");
  const after = characters.slice(end, end + AROUND).join("");
  return {
    before: start > AROUND ? before.replace(/^\S*/, "…") : before,
    text: characters.slice(start, end).join(""),
    after: end + AROUND < characters.length ? after.replace(/\S*$/, "…") : after,
  };
}

/**
 * Cut a text where marks begin and end.
 *
 * @param {string[]} characters of the text, the first of which is character `first`.
 * @param {{start: number, end: number, kind: string}[]} marks may overlap.
 * @returns {{text: string, start: number, kinds: string[]}[]} pieces that together are the text.
 */
export function cut(characters, first, marks) {
  const stop = first + characters.length;
  const near = marks.filter((mark) => mark.start < stop && mark.end > first);
  const borders = new Set([first, stop]);
  for (const { start, end } of near) {
    borders.add(Math.max(start, first));
    borders.add(Math.min(end, stop));
  }
  const ordered = [...borders].sort((a, b) => a - b);
  return ordered.slice(0, -1).map((start, index) => {
    const end = ordered[index + 1];
    const over = near.filter((mark) => mark.start < end && mark.end > start);
    return {
      text: characters.slice(start - first, end - first).join(""),
      start,
      kinds: [...new Set(over.map((mark) => mark.kind))],
    };
  });
}
