/**
 * Elements made from plain values.
 *
 * Every text becomes a text node, so nothing in a document, a name or an answer is ever markup.
 */

export const byId = (id) => document.getElementById(id);

/** Return a new element; an attribute that is null, undefined or false is left out. */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Return a name or a value whose writing direction does not touch what stands around it. */
export const isolated = (text) => element("bdi", {}, String(text));

/** Return a labelled bar for a number from 0 to 1; null for a number that is not known. */
export function bar(label, value) {
  if (value === null || value === undefined) return null;
  const filled = element("span", { class: "filled" });
  filled.style.width = `${100 * Math.min(Math.max(value, 0), 1)}%`;
  const meter = element(
    "span",
    {
      class: "meter", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 1,
      "aria-valuenow": Number(value.toFixed(3)), "aria-valuetext": percent(value),
    },
    filled,
  );
  return element("span", { class: "bar" }, `${label} `, meter, ` ${percent(value)}`);
}

export const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;

export const counted = (number, noun) =>
  `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** Return bytes in the unit that suits them. */
export function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const power = bytes < 1000 ? 0 : Math.min(Math.floor(Math.log10(bytes) / 3), units.length - 1);
  return `${(bytes / 1000 ** power).toLocaleString("en", { maximumFractionDigits: 1 })} ${units[power]}`;
}

let noticeTimer = 0;

/** Say what went wrong where everybody sees it, for half a minute. */
export function notice(message) {
  const node = byId("notice");
  node.textContent = message;
  node.hidden = !message;
  clearTimeout(noticeTimer);
  if (message) noticeTimer = setTimeout(() => notice(""), 30_000);
}
