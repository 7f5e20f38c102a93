/** Files that become documents: dropped or chosen, sent one after another, with their progress. */

import { writeDocument } from "./api.js";
import { byId, element, isolated } from "./elements.js";
import { Pairs } from "./pairs.js";

const OUTCOMES = { added: "added", replaced: "replaced", skipped: "was there already" };

export class Uploads {
  #onWritten;
  #metadata = new Pairs(byId("upload-metadata"), "Metadata");
  #queue = Promise.resolve();

  /** @param {(name: string) => void} onWritten told each document that was written. */
  constructor(onWritten) {
    this.#onWritten = onWritten;
    const [drop, files] = [byId("drop"), byId("files")];
    files.addEventListener("change", () => {
      this.#add([...files.files]);
      files.value = ""; // the same file may be chosen again
    });
    for (const type of ["dragover", "drop"]) {
      // a file that is dropped beside must not replace the page
      document.addEventListener(type, (event) => event.preventDefault());
    }
    drop.addEventListener("dragover", () => drop.classList.add("over"));
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      drop.classList.remove("over");
      this.#add([...event.dataTransfer.files]);
    });
  }

  /** Send files after those that are being sent. */
  #add(files) {
    const metadata = this.#metadata.metadata();
    for (const file of files) {
      const bar = element("progress", { max: 1, value: 0, "aria-label": `Sending ${file.name}` });
      const state = element("span", { role: "status", class: "muted" }, "waits");
      const row = element("li", {}, isolated(file.name), bar, state);
      byId("uploads").append(row);
      this.#queue = this.#queue.then(() => this.#send(file, metadata, row, bar, state));
    }
  }

  async #send(file, metadata, row, bar, state) {
    state.textContent = "sending";
    const onProgress = (share) => {
      bar.value = share;
      if (share < 1) return;
      bar.removeAttribute("value"); // it is not known how long reading takes
      state.textContent = "reading";
    };
    try {
      const written = await writeDocument(file.name, file, metadata, onProgress);
      state.textContent = OUTCOMES[written.status] ?? written.status;
      this.#onWritten(file.name);
    } catch (error) {
      state.textContent = error.message;
      state.className = "error";
    }
    bar.remove();
    row.append(element("button", { type: "button", class: "quiet", "aria-label": `Hide ${file.name}`,
      click: () => row.remove() }, "×"));
  }
}
