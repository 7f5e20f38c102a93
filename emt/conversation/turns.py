"""Turns of a chat as documents, taken from the cache that they were said in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from emt.citations.sentences import sentence_spans
from emt.errors import ConfigError, DocumentError, UnsupportedModelError
from emt.ingest.documents import is_utf8
from emt.memory.memory import Memory
from emt.model.chat import last_message
from memory_backends import Document, Rows
from memory_backends.catalog.metadata import check_metadata
from memory_backends.layout import Metadata

_ABOUT = ("conversation", "turn", "time")  # the metadata of a turn
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
    turn's text is read. No document is replaced: a number that another session has used by now, or
    another document, is left to it.

    Args:
        memory: with a tokenizer.
        said: the turn.
        conversation: its name.
        turn: its number there, from 1; the next one that is free if it is taken.
        metadata: beside `conversation`, `turn`, and `time`, in seconds since 1970.

    Raises:
        DocumentError: metadata that is not flat.
        MemoryUseError, StoreError: as `Memory.refresh` and `Memory.write`.
    """
    memory.refresh()
    while memory.backend.catalog.has_document(name := turn_name(conversation, turn)):
        turn += 1
    about: Metadata = {
        **(metadata or {}),
        "conversation": conversation,
        "turn": turn,
        "time": round(time.time(), 3),
    }
    read = read_turn(memory, said, name, about)
    try:
        if read is not None:
            memory.add(*read)
        else:
            text = f"{said.message}\n{said.answer}".strip()
            memory.write(text, document=name, metadata=about)
    except DocumentError:
        memory.refresh()
        if not memory.backend.catalog.has_document(name):
            raise
        return remember_turn(memory, said, conversation, turn + 1, metadata)  # others were faster
    return name


def turn_name(conversation: str, turn: int) -> str:
    """Return what the document of a turn is called."""
    return f"{conversation}/{turn:04d}"


def check_about(conversation: str, metadata: Metadata) -> None:
    """Refuse what no turn can be remembered with.

    Raises:
        ConfigError: the conversation's name is no text, or metadata has a key that turns have.
        DocumentError: metadata is not flat.
    """
    if not isinstance(conversation, str) or not conversation or not is_utf8(conversation):
        raise ConfigError(f"a conversation's name must be valid Unicode; got {conversation!r}.")
    check_metadata(metadata, turn_name(conversation, 1))
    own = [key for key in _ABOUT if key in metadata]
    if own:
        raise ConfigError(
            f"remembered turns have {', '.join(_ABOUT)} of their own in their metadata; got "
            f"{own[0]!r}. Choose another key."
        )


def read_turn(
    memory: Memory, said: Said, name: str, metadata: Metadata
) -> tuple[Document, Rows] | None:
    """Return a turn as `Memory.add` writes it; None if its cache does not have what was computed.

    Nor does it have a message with the template's own marks in it, which cut it short.

    Raises:
        DocumentError: metadata that is not flat.
        MemoryUseError: as `Memory.remember`.
    """
    tokenizer = memory.tokenizer
    assert tokenizer is not None
    prompt = list(said.token_ids[: said.num_prompt])
    message = last_message(prompt, tokenizer)
    if said.cache is None or message is None:
        return None
    text = tokenizer.decode(prompt[slice(*message)], clean_up_tokenization_spaces=False)
    if str(text).split() != said.message.split():
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
    return {
        turn: name
        for name, about in memory.backend.catalog.all_metadata().items()
        if about.get("conversation") == conversation
        and isinstance(turn := about.get("turn"), int)
        and name == turn_name(conversation, turn)  # other documents may have such metadata, too
    }
