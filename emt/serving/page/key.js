/** The key of this tab: asked for when the server wants one, gone when the tab is closed. */

import { byId } from "./elements.js";

const NAME = "emt-key";
let asking = null; // one dialog serves every request that waits for a key

export const currentKey = () => sessionStorage.getItem(NAME) ?? "";

/** Return the headers that show the key. */
export function keyHeaders() {
  const key = currentKey();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/**
 * Ask for a key; resolves to whether one was given.
 *
 * @param {string} refused the key that the server has refused, empty if none was shown.
 */
export function askForKey(refused) {
  if (currentKey() !== refused) return Promise.resolve(true); // given meanwhile
  asking ??= ask(refused).finally(() => (asking = null));
  return asking;
}

/** Let the user change the key, and start again with it. */
export async function changeKey() {
  const before = currentKey();
  if ((await ask(before, "An empty field takes the key away.")) && currentKey() !== before) {
    location.reload();
  }
}

function ask(refused, reason = "") {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent =
    reason ||
    (refused ? "The server does not know this key." : "This server answers those who have a key.");
  field.value = "";
  byId("change-key").hidden = false;
  dialog.returnValue = "cancel";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    const isEmptyRight = Boolean(reason);
    dialog.addEventListener(
      "close",
      () => {
        const key = field.value.trim();
        field.value = "";
        const isGiven = dialog.returnValue === "use" && (Boolean(key) || isEmptyRight);
        if (isGiven) sessionStorage.setItem(NAME, key);
        resolve(isGiven);
      },
      { once: true },
    );
  });
}

byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));
byId("change-key").addEventListener("click", changeKey);
if (currentKey()) byId("change-key").hidden = false;
