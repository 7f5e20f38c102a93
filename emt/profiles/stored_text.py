"""The text of a memory's documents, to make questions from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from emt.citations.sentences import sentence_spans
from memory_backends import MemoryBackend, StoredDocument

_PIECE = 6000  # characters


def stored_texts(
    backend: MemoryBackend, tokenizer: Any, *, num_texts: int = 64, seed: int = 0
) -> Iterator[str]:
    """Yield pieces of the documents, as many of each document as of any other.

    Args:
        backend: where the documents are.
        tokenizer: for documents that were written as ids; None leaves them out.
        num_texts: how many pieces at most, and `seed` of the choice among them.
    """
    rng = random.Random(seed)
    names = sorted(backend.catalog.document_names())
    names = rng.sample(names, min(num_texts, len(names)))
    per_document = -(-num_texts // max(len(names), 1))
    left = num_texts
    for name in names:
        pieces = list(_pieces(_text_of(backend.catalog.document(name), tokenizer)))
        sample = rng.sample(pieces, min(per_document, left, len(pieces)))
        left -= len(sample)
        yield from sample


def _text_of(document: StoredDocument, tokenizer: Any) -> str:
    if document.text is not None:
        return document.text
    return "" if tokenizer is None else str(tokenizer.decode(document.token_ids.tolist()))


def _pieces(text: str) -> Iterator[str]:
    """Cut a text where sentences end: as many of them make a piece as fit 6,000 characters."""
    start = stop = 0
    for first, stop in sentence_spans(text):
        if stop - start > _PIECE and first > start:
            yield text[start:first]
            start = first
    if stop > start:
        yield text[start:stop]
