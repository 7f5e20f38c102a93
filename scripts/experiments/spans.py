"""Characters of documents: where passages, chunks and evidence stand, and what has what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from emt.memory.memory import Memory
from emt.passage import Passage


class Span(NamedTuple):
    """Characters `start` to `stop` - 1 of a document."""

    document: str
    start: int
    stop: int


def covers(spans: Iterable[Span], wanted: Span) -> bool:
    """Tell whether some spans together have every character of another."""
    reached = wanted.start
    for span in sorted(span for span in spans if span.document == wanted.document):
        if span.start <= reached:
            reached = max(reached, span.stop)
    return reached >= wanted.stop


def span_of(memory: Memory, passage: Passage) -> Span:
    """Return the characters of a passage; none of a document that was not written as text."""
    document = memory.backend.catalog.document(passage.document)
    if document.text is None or document.offsets is None:
        return Span(passage.document, 0, 0)
    spans = document.offsets[document.row_tokens[passage.first : passage.stop]]
    return Span(passage.document, int(spans[0, 0]), int(spans[-1, 1]))


def text_of(memory: Memory, passage: Passage) -> str:
    """Return the text of a passage; "" of a document that was not written as text."""
    _, start, stop = span_of(memory, passage)
    return (memory.backend.catalog.document(passage.document).text or "")[start:stop]
