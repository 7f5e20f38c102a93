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
 * Ask for a key that the server wants; resolves to whether one was given.
 *
 * @param {string} refused the key that the server has refused, empty if none was shown.
 */
export function askForKey(refused) {
  if (currentKey() !== refused) return Promise.resolve(true); // given meanwhile
  const reason = refused
    ? "The server does not know this key."
    : "This server answers those who have a key.";
  asking ??= ask(reason)
    .then((key) => {
      if (key) sessionStorage.setItem(NAME, key);
      return Boolean(key);
    })
    .finally(() => (asking = null));
  return asking;
}

/** Let the user change the key, and start again with it. */
async function changeKey() {
  const key = await ask("An empty field takes the key away.");
  if (key === null) return;
  sessionStorage.setItem(NAME, key);
  location.reload();
}

/** Show the dialog; resolves to what was written, or null if the user wants no other key. */
function ask(reason) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent = reason;
  byId("change-key").hidden = false;
  field.value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    const finish = () => {
      resolve(dialog.returnValue === "use" ? field.value.trim() : null);
      field.value = "";
    };
    dialog.addEventListener("close", finish, { once: true });
  });
}

byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));
byId("change-key").addEventListener("click", changeKey);
if (currentKey()) byId("change-key").hidden = false;
