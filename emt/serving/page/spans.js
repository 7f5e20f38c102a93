/**
 * Spans of characters. The server counts characters (code points), JavaScript's strings count
 * UTF-16 units; so texts are cut as arrays of characters.
 */

const LONGEST_CLIP = 160;

/** Return some characters of a text, shortened if they are many. */
export function clip(text, start, end) {
  const characters = [...text].slice(Math.max(start, 0), Math.min(end, start + LONGEST_CLIP));
  return characters.join("") + (end - start > LONGEST_CLIP ? "…" : "");
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
