"""Turns that clients ask to be remembered: read from the cache as they end, and written then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emt.calls import overrides_of
from emt.conversation.turns import Said, only_asks, read_turn, turn_name
from emt.memory.memory import Memory
from emt.serving.access import Access
from memory_backends import Document, Rows
from memory_backends.catalog import Catalog
from memory_backends.layout import Metadata


@dataclass(frozen=True)
class ConversationRequest:
    """What a request says of the conversation that its turn is remembered in.

    Attributes:
        name: of the conversation.
        messages: the user's, the last one among them.
    """

    name: str
    messages: Sequence[str]


@dataclass(frozen=True)
class UnwrittenTurn:
    """A turn to be written.

    Attributes:
        text: of message and answer.
        read: its document and rows; None if the text has to be read.
    """

    text: str
    read: tuple[Document, Rows] | None


def turn_in_batch(
    memory: Memory,
    conversation: ConversationRequest,
    answer: str,
    input_ids: Tensor,
    row: int,
    lengths: Sequence[int],
    num_new: int,
) -> UnwrittenTurn:
    """Take a turn from the cache of the batch that is being generated.

    Args:
        memory: of the model.
        conversation: of the turn.
        answer: its text.
        input_ids: (B, T) int64, prompts padded on the left, and what was generated.
        row: which of the B it is.
        lengths: tokens of each prompt.
        num_new: how many of the T were generated.
    """
    message, width = conversation.messages[-1], input_ids.shape[1] - num_new
    starts = torch.tensor([[width - length] for length in lengths])
    mask = (torch.arange(input_ids.shape[1]) >= starts).long()
    generation = overrides_of(memory).generation
    cache = None if generation is None else generation.cache
    ids = input_ids[row].tolist()
    said = Said(message, answer, ids, width, cache, row, mask)
    read = read_turn(memory, said, conversation.name, {})
    return UnwrittenTurn(f"{message}\n{answer}".strip(), read)


def says_something(conversation: ConversationRequest, recalled: Sequence[object]) -> bool:
    """Tell whether a turn is worth remembering; see `only_asks`."""
    return not (recalled and only_asks(conversation.messages[-1]))


def named(
    catalog: Catalog, access: Access, conversation: ConversationRequest
) -> tuple[str, Metadata]:
    """Return name and metadata of the next turn of a conversation, of those that are seen."""
    every, names = catalog.all_metadata(), access.documents(catalog)
    turns = [
        about["turn"]
        for about in (every.get(stored, {}) for stored in names.values())
        if about.get("conversation") == conversation.name and isinstance(about.get("turn"), int)
    ]
    turn = 1 + max((int(number) for number in turns), default=0)
    while (name := turn_name(conversation.name, turn)) in names:  # of a document that is no turn
        turn += 1
    about: Metadata = {
        "conversation": conversation.name,
        "turn": turn,
        "time": round(time.time(), 3),
    }
    return name, access.stamped(about)


def hidden(catalog: Catalog, access: Access, conversation: ConversationRequest) -> set[str]:
    """Return the remembered turns, as the store calls them, whose messages the prompt has."""
    said, names = set(conversation.messages), set()
    every = catalog.all_metadata()
    for stored in access.documents(catalog).values():
        if every.get(stored, {}).get("conversation") == conversation.name:
            text = catalog.document(stored).text or ""
            if any(text.startswith(f"{message}\n") for message in said):
                names.add(stored)
    return names


def renamed(read: tuple[Document, Rows], name: str, metadata: Metadata) -> tuple[Document, Rows]:
    """Return a document and its rows with another name and metadata."""
    document, rows = read
    return replace(document, name=name, metadata=metadata), rows
