/** The server's routes. Addresses are relative, so the page works behind a proxy's prefix too. */

import { events } from "./events.js";
import { askForKey, currentKey, keyHeaders } from "./key.js";

/** What the server refused, in its own words. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const documentPath = (name) => `v1/documents/${encodeURIComponent(name)}`;
const withQuery = (path, parameters) => `${path}?${new URLSearchParams(parameters)}`;

export const models = () => json("v1/models");
export const store = (signal) => json("v1/store", { signal });
export const removeDocument = (name) => json(documentPath(name), { method: "DELETE" });

/** Return documents whose names have `query` in them, after the document `after`. */
export function listDocuments({ query, where, after, limit, signal }) {
  const parameters = { limit };
  if (query) parameters.query = query;
  if (after !== null) parameters.after = after;
  if (Object.keys(where).length) parameters.where = JSON.stringify(where);
  return json(withQuery("v1/documents", parameters), { signal });
}

/** Return the characters from `start` to `end` of a document, and what is known of it. */
export const readDocument = (name, start, end, signal) =>
  json(withQuery(documentPath(name), { start, end }), { signal });

/** Yield the chunks of a streamed answer, as objects. */
export async function* complete(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 500);
      yield chunk;
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // which a lost connection is
  }
  throw new ApiError("The answer broke off: the connection was lost before its end.", 0);
}

/**
 * Write a file as a document; resolves to the server's account of it.
 *
 * XMLHttpRequest, because fetch does not tell how much of a body was sent.
 *
 * @param {(share: number) => void} onProgress told which share of the file was sent; 1 when the
 *   server has it and reads.
 */
export async function writeDocument(name, file, metadata, onProgress) {
  for (;;) {
    const shown = currentKey();
    const answer = await put(withQuery(documentPath(name), { metadata: JSON.stringify(metadata) }),
      file, onProgress);
    if (answer.status === 401 && (await askForKey(shown))) continue;
    if (answer.status === 0) {
      throw new ApiError("It was not sent: it is too large, or no file, or the server is away.", 0);
    }
    if (answer.status >= 300) throw errorOf(answer.status, answer.text, answer.retryAfter);
    return JSON.parse(answer.text);
  }
}

function put(path, file, onProgress) {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    request.open("PUT", path);
    request.setRequestHeader("Content-Type", "text/plain; charset=utf-8");
    for (const [name, value] of Object.entries(keyHeaders())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / Math.max(event.total, 1));
    request.upload.onload = () => onProgress(1);
    request.onloadend = () =>
      resolve({
        status: request.status,
        text: request.responseText,
        retryAfter: request.getResponseHeader("Retry-After"),
      });
    request.send(file);
  });
}

async function json(path, options) {
  return (await send(path, options)).json();
}

/** Send a request, with a key if the server wants one; an ApiError for what it refuses. */
async function send(path, options = {}) {
  for (;;) {
    const shown = currentKey();
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...options.headers, ...keyHeaders() } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server was not reached.", 0);
    }
    if (response.status === 401 && (await askForKey(shown))) continue;
    if (!response.ok) {
      throw errorOf(response.status, await response.text(), response.headers.get("Retry-After"));
    }
    return response;
  }
}

function errorOf(status, text, retryAfter) {
  let message;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = `The server answered with status ${status}.`;
  }
  if (retryAfter) message += ` Try again in ${retryAfter} s.`;
  return new ApiError(message, status);
}
