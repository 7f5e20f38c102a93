"""The conditions of the retrieval experiment: how a question is put, and what is remembered."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.passage import Passage
from experiments.items import Item
from experiments.retrieval.answering import LocalModel, Responder, Response
from experiments.retrieval.prompts import (
    Prompt,
    Templates,
    closed_book,
    with_chunks,
    with_document,
)
from experiments.retrieval.scoring import candidates_of, is_right
from experiments.retrieval.shelf import Shelf

KINDS = ("closed_book", "document", "emt", "passage", "rag", "rag_emt", "rag_passage")
_MODES = {"emt": "token", "rag_emt": "token", "passage": "passage", "rag_passage": "passage"}
FIXED = ("path", "enabled")  # settings of a memory that the experiment sets itself
STANDARD: dict[str, dict[str, Any]] = {
    "closed_book": {"kind": "closed_book"},
    "document": {"kind": "document"},
    "emt_manual": {"kind": "emt", "memory": {"memory_type": "manual"}},
    "emt_vector_db": {"kind": "emt", "memory": {"memory_type": "vector_db"}},
    "passage": {"kind": "passage", "memory": {"memory_type": "vector_db"}},
    "rag": {"kind": "rag"},
    "rag_emt": {"kind": "rag_emt", "memory": {"memory_type": "manual"}},
}


DEFAULT = tuple(name for name in STANDARD if name != "passage")  # which needs a head profile


@dataclass(frozen=True)
class Condition:
    """One way to answer.

    Attributes:
        name: in results.
        kind: one of `KINDS`.
        memory: its settings, for kinds with a memory.
    """

    name: str
    kind: str
    memory: MemoryConfig | None = None

    @property
    def has_chunks(self) -> bool:
        """Tell whether chunks of documents are retrieved into the prompt."""
        return self.kind.startswith("rag")


def conditions_of(
    named: Mapping[str, Any] | Sequence[str], memory: Mapping[str, Any]
) -> list[Condition]:
    """Make conditions from settings.

    Args:
        named: names of `STANDARD`; or name -> nothing, for one of these, or `kind` and `memory`.
        memory: settings of every memory; a condition's own `memory` goes before them.

    Raises:
        ConfigError: a condition, kind or key is unknown, or a memory's setting wrong.
    """
    is_list = isinstance(named, list | tuple) and all(isinstance(one, str) for one in named)
    if not named or not (is_list or isinstance(named, Mapping)):
        raise ConfigError(f"conditions must be some of {', '.join(STANDARD)}; got {named!r}.")
    given = named if isinstance(named, Mapping) else dict.fromkeys(named)
    return [_condition(str(name), values, memory) for name, values in given.items()]


def _condition(name: str, values: Any, memory: Mapping[str, Any]) -> Condition:
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"condition '{name}' must be a mapping; got {values!r}.")
    found = {**STANDARD.get(name, {}), **(values or {})}
    if "kind" not in found:
        raise ConfigError(
            f"unknown condition '{name}'. The conditions are {', '.join(STANDARD)}; "
            f"another one needs a kind: {', '.join(KINDS)}."
        )
    for key in found:
        if key not in ("kind", "memory"):
            raise ConfigError(f"condition '{name}' has kind and memory; got {key!r}.")
    kind, own = found["kind"], found.get("memory")
    if kind not in KINDS:
        raise ConfigError(f"condition '{name}' must have a kind of {', '.join(KINDS)}; got {kind}.")
    if kind not in _MODES:
        if own:
            raise ConfigError(f"condition '{name}' of kind {kind} has no memory. Remove it.")
        return Condition(name, kind)
    standard = STANDARD.get(name, {}).get("memory", {})
    for key in FIXED:
        if key in (own or {}):
            raise ConfigError(
                f"condition '{name}': {key} cannot be set: the experiment sets it. Leave it out."
            )
    try:
        mode = {"mode": _MODES[kind]}
        config = MemoryConfig.from_dict({**memory, **standard, **(own or {}), **mode})
    except ConfigError as error:
        raise ConfigError(f"condition '{name}': {error}") from error
    return Condition(name, kind, config)


@dataclass(frozen=True)
class Answered:
    """One item's answer.

    Attributes:
        text: what was said.
        log_probs: of `candidates_of(item)`, mean per token; None if the model does not tell.
        num_prompt_tokens: of the whole prompt.
        truncated: something was left out for want of positions.
        has_answer: the text in the prompt, or a passage that was recalled, has the answer; None if
            there is neither.
        seconds: to find chunks, read the prompt and answer; not to make the memory.
        is_cited: of a right answer given with passages: the one cited first has the answer; None of
            any other.
    """

    text: str
    log_probs: tuple[float, ...] | None
    num_prompt_tokens: int
    truncated: bool
    has_answer: bool | None
    seconds: float
    is_cited: bool | None = None


class Answerer(Protocol):
    """Whatever can answer items."""

    def answer(self, item: Item) -> Answered:
        """Answer one item."""


class Asking:
    """Answers by asking a model.

    Args:
        responder: who is asked.
        prompt: how.
    """

    def __init__(self, responder: Responder, prompt: Callable[[Item], Prompt]) -> None:
        self.responder = responder
        self.prompt = prompt

    def respond(self, item: Item) -> Response:
        """Answer one item, and tell nothing else."""
        return self.responder.respond(self.prompt(item).message)

    def answer(self, item: Item) -> Answered:
        """Answer one item."""
        started = time.perf_counter()
        asked = self.prompt(item)
        preparing = time.perf_counter() - started
        said = self.responder.respond(asked.message, candidates_of(item))
        return Answered(
            said.text,
            said.log_probs,
            said.num_prompt_tokens,
            asked.truncated,
            asked.has_answer,
            preparing + said.seconds,
        )


class AskingWithPassages:
    """Answers by asking a model that is given passages of its memory.

    Args:
        asking: how it is asked.
        memory: in passage mode.
    """

    def __init__(self, asking: Asking, memory: Memory) -> None:
        self._asking = asking
        self._memory = memory

    def answer(self, item: Item) -> Answered:
        """Answer one item; see whether a passage had the answer, and was cited for it."""
        with self._memory.recording() as recording:
            answered = self._asking.answer(item)
        texts = [
            text_of(self._memory, one.passage)
            for routed in recording.routed[:1]
            for one in routed.passages
        ]
        has_answer = bool(answered.has_answer) or any(is_right(text, item.answer) for text in texts)
        is_cited = self._is_cited(item) if is_right(answered.text, item.answer) else None
        return replace(answered, has_answer=has_answer, is_cited=is_cited)

    def _is_cited(self, item: Item) -> bool:
        """Answer once more, for a recording of this answer alone, and look at its citations."""
        with self._memory.recording() as recording:
            self._asking.respond(item)
        cited = recording.citations("passage")
        return bool(cited) and is_right(cited[0].text, item.answer)


def text_of(memory: Memory, passage: Passage) -> str:
    """Return the text of a passage of a document that was written as text."""
    document = memory.backend.catalog.document(passage.document)
    if document.text is None or document.offsets is None:
        return ""
    spans = document.offsets[document.row_tokens[passage.first : passage.stop]]
    return document.text[int(spans[0, 0]) : int(spans[-1, 1])]


@contextlib.contextmanager
def answering(
    condition: Condition,
    responder: Responder,
    shelf: Shelf,
    *,
    templates: Templates,
    num_chunks: int = 5,
) -> Iterator[Answerer]:
    """Make an answerer for a block; while it lasts, a condition's memory is attached.

    Raises:
        ConfigError: a memory is asked for, and the model is not a local one.
    """

    if condition.has_chunks:
        _ = shelf.chunks  # made now, so that no answer's time has it

    def prompt(item: Item) -> Prompt:
        if condition.kind == "document":
            return with_document(item, responder, templates)
        if condition.has_chunks:
            best = shelf.chunks.best(item.question, num_chunks)
            return with_chunks(item, best, responder, templates)
        return closed_book(item, templates)

    asking = Asking(responder, prompt)
    if condition.memory is None:
        yield asking
        return
    if not isinstance(responder, LocalModel):
        raise ConfigError(
            f"condition '{condition.name}' needs the model itself, which an endpoint does not "
            f"give. Leave it out."
        )
    with shelf.remembered(responder.model, condition.memory, responder.tokenizer) as memory:
        is_recalling = condition.memory.mode == "passage"
        yield AskingWithPassages(asking, memory) if is_recalling else asking
