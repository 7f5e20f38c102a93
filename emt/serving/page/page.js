/** The page: its two views, and what happens in one part because of another. */

import { Chat } from "./chat.js";
import { Documents } from "./documents.js";
import { byId } from "./elements.js";
import { Sources } from "./sources.js";
import { Uploads } from "./uploads.js";

const sources = new Sources();
const chat = new Chat(sources);
const documents = new Documents({
  read: (name) => sources.read(name),
  toggle: (name) => {
    if (chat.toggleDocument(name)) location.hash = "#ask";
  },
  forget: (name) => {
    sources.forget(name);
    chat.forget(name);
  },
});
new Uploads((name) => {
  sources.forget(name);
  documents.refresh();
});

/** Show the view that the address names. */
function showView() {
  const isDocuments = location.hash === "#documents";
  byId("ask").hidden = isDocuments;
  byId("documents").hidden = !isDocuments;
  byId("passages").hidden = isDocuments;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === (isDocuments ? "#documents" : "#ask")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

addEventListener("hashchange", showView);
document.addEventListener("keydown", (event) => event.key === "Escape" && sources.close());
showView();
documents.refresh();
