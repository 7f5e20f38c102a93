"""Turns of a chat as documents, taken from the cache that they were said in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from emt.citations.sentences import sentence_spans
from emt.errors import UnsupportedModelError
from emt.memory.memory import Memory
from emt.model.chat import last_message
from memory_backends import Document, Rows
from memory_backends.layout import Metadata

_QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e")


@dataclass(frozen=True)
class Said:
    """A user's message and its answer, as a model has run them.

    Attributes:
        message: what the user said.
        answer: what the model did.
        token_ids: of the whole prompt, padding included, and after it of the answer.
        num_prompt: how many of them are the prompt.
        cache: filled by generating.
        sequence: which of the cache's sequences it is.
        attention_mask: of the cache's sequences; None if none is padded.
    """

    message: str
    answer: str
    token_ids: Sequence[int]
    num_prompt: int
    cache: Cache | None
    sequence: int = 0
    attention_mask: Tensor | None = None


def remember_turn(
    memory: Memory, said: Said, conversation: str, turn: int, metadata: Metadata | None = None
) -> str:
    """Write a turn as a document, and return its name: "CONVERSATION/0007".

    Its rows are taken from the cache, without the template; where that does not have them, the
    turn's text is read. A turn of the same number is replaced.

    Args:
        memory: with a tokenizer.
        said: the turn.
        conversation: its name.
        turn: its number there, from 1.
        metadata: beside `conversation`, `turn`, and `time`, in seconds since 1970.

    Raises:
        DocumentError: metadata that is not flat.
        MemoryUseError, StoreError: as `Memory.write`.
    """
    name = f"{conversation}/{turn:04d}"
    about: Metadata = {
        **(metadata or {}),
        "conversation": conversation,
        "turn": turn,
        "time": round(time.time(), 3),
    }
    read = read_turn(memory, said, name, about)
    if read is not None:
        memory.add(*read, replace=True)
    else:
        text = f"{said.message}\n{said.answer}".strip()
        memory.write(text, document=name, replace=True, metadata=about)
    return name


def read_turn(
    memory: Memory, said: Said, name: str, metadata: Metadata
) -> tuple[Document, Rows] | None:
    """Return a turn as `Memory.add` writes it; None if its cache does not have what was computed.

    Raises:
        DocumentError: metadata that is not flat.
        MemoryUseError: as `Memory.remember`.
    """
    assert memory.tokenizer is not None
    message = last_message(list(said.token_ids[: said.num_prompt]), memory.tokenizer)
    if said.cache is None or message is None:
        return None
    try:
        return memory.read_cache(
            said.cache,
            list(said.token_ids),
            document=name,
            spans=[message, (said.num_prompt, len(said.token_ids))],
            sequence=said.sequence,
            attention_mask=said.attention_mask,
            metadata=metadata,
        )
    except UnsupportedModelError:
        return None


def only_asks(message: str) -> bool:
    """Tell whether each sentence of a message is a question.

    Asked of what is remembered, it says nothing new; remembered itself, it would be found first
    when somebody asks the same again, before what was corrected since.
    """
    sentences = [message[start:stop].strip() for start, stop in sentence_spans(message)]
    return bool(sentences) and all(each.endswith(_QUESTION_MARKS) for each in sentences if each)


def turns_of(memory: Memory, conversation: str) -> dict[int, str]:
    """Return the remembered turns of a conversation: number -> name of the document."""
    every = memory.backend.catalog.all_metadata()
    return {
        int(about["turn"]): name
        for name, about in every.items()
        if about.get("conversation") == conversation and isinstance(about.get("turn"), int)
    }
