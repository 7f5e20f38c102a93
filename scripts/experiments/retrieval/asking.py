"""Asking the items of one condition: the prompt, the memory, and what is kept of an answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from emt.errors import ConfigError
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
    with shelf.remembered(responder, config):
        yield lambda item: {
            **_asked(item, prompt, responder),
            "memory_seconds": round(shelf.seconds, 3),
        }


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
        "seconds": round(preparing + response.seconds, 4),
        "text": response.text,
    }
