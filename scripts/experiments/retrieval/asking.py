"""Asking the items of one condition: the prompt, the memory, and what is kept of an answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.passage import Passage
from experiments.items import Item, says
from experiments.prompts import Prompt, closed_book, with_chunks, with_document
from experiments.responder import LocalModel, Responder, Response
from experiments.retrieval.settings import RetrievalSettings
from experiments.retrieval.shelf import Shelf

Asking = Callable[[Item], dict[str, Any]]


@contextlib.contextmanager
def asking(
    name: str, settings: RetrievalSettings, responder: Responder, shelf: Shelf
) -> Iterator[Asking]:
    """Make a condition's function from an item to its record; its memory is attached meanwhile.

    Raises:
        ConfigError: a memory is asked for, and the model is not a local one.
    """
    condition, config = settings.conditions[name], settings.config_of(name)
    if condition.has_chunks:
        _ = shelf.chunks  # made now, so that no answer's time has it

    def prompt(item: Item) -> Prompt:
        if condition.kind == "document":
            return with_document(item.context, item.question, responder, settings.templates)
        if condition.has_chunks:
            best = shelf.chunks.best(item.question, settings.chunks)
            return with_chunks(best, item.question, responder, settings.templates)
        return closed_book(item.question, settings.templates)

    if config is None:
        yield lambda item: {**_asked(item, prompt, responder), "memory_seconds": None}
        return
    if not isinstance(responder, LocalModel):
        raise ConfigError(f"condition '{name}' needs the model itself. Leave it out.")
    with shelf.remembered(responder, config) as memory:

        def remembering(item: Item) -> dict[str, Any]:
            if config.mode == "passage":
                record = _asked_with_passages(item, prompt, responder, memory)
            else:
                record = _asked(item, prompt, responder)
            return {**record, "memory_seconds": round(shelf.seconds, 3)}

        yield remembering


def scores(item: Item, response: Response) -> dict[str, Any]:
    """Score one answer.

    Returns:
        `right`; `original`, whether the original answer was said (also beside the right one);
        `log_prob` and `original_log_prob`, mean per token in nats; `preferred`, whether the first
        is above the second. None for what is not known.
    """
    original = item.original_answer
    log_prob, original_log_prob, *_ = (*(response.log_probs or ()), None, None)
    is_known = log_prob is not None and original_log_prob is not None
    return {
        "right": says(response.text, item.answer),
        "original": None if original is None else says(response.text, original),
        "log_prob": log_prob,
        "original_log_prob": original_log_prob,
        "preferred": log_prob > original_log_prob if is_known else None,
    }


def text_of(memory: Memory, passage: Passage) -> str:
    """Return the text of a passage of a document that was written as text."""
    document = memory.backend.catalog.document(passage.document)
    if document.text is None or document.offsets is None:
        return ""
    spans = document.offsets[document.row_tokens[passage.first : passage.stop]]
    return document.text[int(spans[0, 0]) : int(spans[-1, 1])]


def _asked(item: Item, prompt: Callable[[Item], Prompt], responder: Responder) -> dict[str, Any]:
    """Ask one item; `seconds` are those to find chunks, read the prompt and answer."""
    started = time.perf_counter()
    made = prompt(item)
    preparing = time.perf_counter() - started
    response = responder.respond(made.message, item.candidates)
    return {
        **scores(item, response),
        "num_prompt_tokens": response.num_prompt_tokens,
        "truncated": made.truncated,
        "has_answer": None if made.text is None else says(made.text, item.answer),
        "is_cited": None,
        "seconds": round(preparing + response.seconds, 4),
        "text": response.text,
    }


def _asked_with_passages(
    item: Item, prompt: Callable[[Item], Prompt], responder: Responder, memory: Memory
) -> dict[str, Any]:
    """Ask one item of a memory in passage mode.

    `has_answer` counts the recalled passages, too; `is_cited` tells of a right answer whether the
    passage cited first has it.
    """
    with memory.recording() as recording:
        record = _asked(item, prompt, responder)
    passages = [recalled.passage for routed in recording.routed[:1] for recalled in routed.passages]
    is_recalled = any(says(text_of(memory, passage), item.answer) for passage in passages)
    record["has_answer"] = bool(record["has_answer"]) or is_recalled
    if record["right"]:  # once more, for a recording of the answer alone
        with memory.recording() as recording:
            responder.respond(prompt(item).message)
        cited = recording.citations("passage", top=1)
        record["is_cited"] = bool(cited) and says(cited[0].text, item.answer)
    return record
