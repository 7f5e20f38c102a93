"""What an answer was made from, as JSON: quotes, passages, and the sources of each token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from emt.citations.citing import Citation, RowCitation, quoted
from emt.citations.recording import Recording
from emt.memory.memory import Memory
from emt.serving.access import Access


@dataclass(frozen=True)
class AnswerSources:
    """What one answer was made from.

    Attributes:
        citations: the sentences that it was copied from, or that were attended to most.
        passages: what was recalled for its prompt.
        tokens: each token's text with its sources; None if not asked for.
    """

    citations: list[dict[str, Any]] = field(default_factory=list)
    passages: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that a choice has beside OpenAI's."""
        shown = {"citations": self.citations, "passages": self.passages}
        return shown if self.tokens is None else {**shown, "tokens": self.tokens}


def sources_of(
    memory: Memory,
    recording: Recording,
    sequence: int,
    token_texts: Sequence[str],
    access: Access,
    *,
    by_token: bool,
) -> AnswerSources:
    """Return what one sequence of a batch was made from.

    Args:
        memory: that was recorded.
        recording: of the batch.
        sequence: its row.
        token_texts: the text of each of its tokens.
        access: of whoever asked: what documents are called.
        by_token: tell the sources of each token, too.
    """
    num_tokens, catalog = len(token_texts), memory.backend.catalog

    @functools.cache
    def name_of(stored: str) -> str:
        return access.shown_name(catalog, stored)

    cited = recording.citations(sequence=sequence, num_tokens=num_tokens)
    recalled = recording.citations("passage", sequence=sequence, num_tokens=num_tokens, top=None)
    tokens = None
    if by_token:
        rows = recording.token_citations(sequence=sequence, num_tokens=num_tokens)
        tokens = _with_sources(memory, token_texts, rows, name_of)
    return AnswerSources(
        [_place(each, "quote", name_of) | {"copied": each.copied} for each in cited],
        [_place(each, "text", name_of) for each in recalled],
        tokens,
    )


def _place(citation: Citation, text: str, name_of: Callable[[str], str]) -> dict[str, Any]:
    return {
        "document": name_of(citation.document),
        "start": citation.start,
        "end": citation.end,
        text: citation.text,
        "score": citation.score,
        "share": citation.share,
    }


def _with_sources(
    memory: Memory,
    token_texts: Sequence[str],
    rows: Sequence[Sequence[RowCitation]],
    name_of: Callable[[str], str],
) -> list[dict[str, Any]]:
    document_of = functools.cache(memory.backend.catalog.document)

    def source(row: RowCitation) -> dict[str, Any]:
        document = document_of(row.document)
        start, end, _ = quoted(document, row.token, row.token + 1, None)
        return {"document": name_of(row.document), "start": start, "end": end, "share": row.share}

    by_token = list(rows) or [[] for _ in token_texts]
    return [
        {"text": text, "sources": [source(row) for row in of_token]}
        for text, of_token in zip(token_texts, by_token, strict=True)
    ]
