/** The conversation: questions, answers that stream, and their history, which is in the page only. */

import { hideTip, showTokens } from "./answer.js";
import { complete, models } from "./api.js";
import { byId, counted, element, isolated } from "./elements.js";
import { Pairs } from "./pairs.js";

const LEAST_COPIED = 0.1; // of all that was copied

export class Chat {
  #sources;
  #messages = []; // what the model is shown: {role, content}
  #asked = new Set(); // names of the only documents to ask
  #where = new Pairs(byId("ask-where"), "Only documents with");
  #answering = null; // the AbortController of the answer under way
  #model = null;

  constructor(sources) {
    this.#sources = sources;
    byId("question-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    byId("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("question-form").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.#answering?.abort());
    byId("new-chat").addEventListener("click", () => this.#clear());
  }

  /** Ask one document only, or no longer only it; tells whether it is chosen now. */
  toggleDocument(name) {
    if (!this.#asked.delete(name)) this.#asked.add(name);
    byId("chosen").replaceChildren(
      ...[...this.#asked].map((each) =>
        element("button", { type: "button", "aria-label": `Ask other documents than ${each} too`,
          click: () => this.toggleDocument(each) }, "only ", isolated(each), " ×")),
    );
    return this.#asked.has(name);
  }

  /** A document was removed: a question must not name it. */
  forget(name) {
    if (this.#asked.has(name)) this.toggleDocument(name);
  }

  #clear() {
    this.#answering?.abort();
    this.#messages = [];
    byId("conversation").replaceChildren(byId("conversation").firstElementChild);
    byId("welcome").hidden = false;
    hideTip();
    byId("question").focus();
  }

  async #ask() {
    const field = byId("question");
    const question = field.value.trim();
    if (!question || this.#answering) return;
    field.value = "";
    const answer = showTurn(question);
    const messages = [...this.#messages, { role: "user", content: question }];
    this.#busy(new AbortController());
    const outcome = await this.#outcome(messages, answer, this.#answering.signal);
    answer.removeAttribute("aria-busy");
    this.#busy(null, outcome);
    if (!answer.isConnected) return; // there is a new chat meanwhile, which it is no part of
    const content = answer.firstElementChild.textContent;
    if (content) this.#messages = [...messages, { role: "assistant", content }];
    else field.value ||= question; // to be sent again
  }

  /** Let an answer come to its end, to an error, or to where it is stopped; returns it in words. */
  async #outcome(messages, answer, signal) {
    try {
      return await this.#stream(messages, answer, signal);
    } catch (error) {
      const [outcome, kind] = signal.aborted ? ["Stopped.", "muted"] : [error.message, "error"];
      answer.append(element("p", { class: kind }, outcome));
      return outcome;
    }
  }

  /** Show an answer while it comes, and then what it drew on; returns the outcome in words. */
  async #stream(messages, answer, signal) {
    const usesMemory = byId("use-memory").checked;
    const text = answer.firstElementChild;
    let sources;
    let usage = null;
    for await (const chunk of complete(await this.#request(messages, usesMemory), signal)) {
      const piece = chunk.choices[0]?.delta?.content;
      if (piece) appendInView(text, piece);
      sources = chunk.memory?.[0] ?? sources;
      usage = chunk.usage ?? usage;
    }
    const tokens = sources?.tokens ?? [];
    return this.#finish(answer, { usesMemory, ...evidenceOf(sources) }, tokens, usage);
  }

  #finish(answer, turn, tokens, usage) {
    showTokens(answer.firstElementChild, tokens,
      (sources) => this.#sources.describe(turn, sources),
      (sources) => this.#sources.point(turn, sources));
    this.#sources.show(turn);
    const found = turn.passages.length
      ? `Drawn from ${counted(turn.passages.length, "passage")}`
      : turn.usesMemory
        ? "Nothing relevant in the memory: this is the model's own answer"
        : "Answered without the memory";
    const footer = element("p", { class: "footer muted" });
    if (turn.passages.length) {
      const show = () => {
        this.#sources.show(turn);
        this.#sources.open();
      };
      footer.append(element("button", { type: "button", class: "link", click: show }, found));
    } else {
      footer.append(element("span", { class: "nothing" }, found));
    }
    if (usage) footer.append(` · ${counted(usage.completion_tokens, "token")}`);
    answer.append(footer);
    keepInView(answer);
    return `The answer is complete. ${found}.`;
  }

  async #request(messages, usesMemory) {
    this.#model ??= (await models()).data[0].id;
    const memory = { enabled: usesMemory };
    if (usesMemory) {
      memory.tokens = true;
      if (this.#asked.size) memory.documents = [...this.#asked];
      if (this.#where.pairs.length) memory.where = this.#where.where();
    }
    return {
      model: this.#model,
      messages,
      memory,
      max_tokens: byId("max-tokens").valueAsNumber || 256,
      temperature: byId("temperature").valueAsNumber || 0,
    };
  }

  /** Say that an answer is under way, or how it ended. */
  #busy(answering, outcome = "Answering.") {
    this.#answering = answering;
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = answering !== null;
    byId("stop").hidden = answering === null;
    if (hadFocus) (answering ? byId("stop") : byId("question")).focus();
    byId("progress").textContent = outcome;
  }
}

/** Add a question to the conversation; returns the element of its answer, which has no text yet. */
function showTurn(question) {
  const conversation = byId("conversation");
  const answer = element("article", { class: "answer", "aria-label": "Answer", "aria-busy": "true" },
    element("p", { class: "text", dir: "auto" }));
  byId("welcome").hidden = true;
  conversation.append(
    element("article", { class: "question", "aria-label": "You asked" },
      element("p", { class: "text", dir: "auto" }, question)), answer);
  keepInView(answer);
  return answer;
}

/**
 * Return the passages that an answer drew on, and the sentences in them that it copied; if it
 * copied none, the one it attended to most. Where no passage was recalled as a whole, as in token
 * mode, the sentences are the passages.
 */
function evidenceOf({ passages = [], citations = [] } = {}) {
  if (!passages.length) {
    return { passages: citations.map((each) => ({ ...each, text: each.quote })), quotes: [] };
  }
  const copied = citations.filter((citation) => citation.copied >= LEAST_COPIED);
  return { passages, quotes: copied.length ? copied : citations.slice(0, 1) };
}

function appendInView(node, text) {
  const follow = isAtEnd();
  node.append(text);
  if (follow) keepInView(node);
}

/** Tell whether the end of the conversation is seen; who has scrolled up wants to stay there. */
function isAtEnd() {
  const { scrollTop, clientHeight, scrollHeight } = byId("conversation");
  return scrollHeight - scrollTop - clientHeight < 60;
}

function keepInView(node) {
  if (node.isConnected) byId("conversation").scrollTop = byId("conversation").scrollHeight;
}
