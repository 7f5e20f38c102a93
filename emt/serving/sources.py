"""What an answer was made from, as JSON: quotes, passages, and the sources of each token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    recording: Recording | None,
    sequence: int,
    token_texts: Sequence[str],
    *,
    access: Access,
    by_token: bool,
) -> AnswerSources:
    """Return what one sequence of a batch was made from.

    Args:
        memory: that was recorded.
        recording: of the batch; None if the memory took no part.
        sequence: its row.
        token_texts: the text of each of its tokens.
        access: what the documents are called.
        by_token: tell the sources of each token, too.
    """
    if recording is None:
        tokens = [{"text": text, "sources": []} for text in token_texts]
        return AnswerSources(tokens=tokens if by_token else None)
    num_tokens, catalog = len(token_texts), memory.backend.catalog
    shown_name = functools.cache(functools.partial(access.shown_name, catalog))
    document_of = functools.cache(catalog.document)

    def place(cited: Citation, text: str) -> dict[str, Any]:
        return {
            "document": shown_name(cited.document),
            "start": cited.start,
            "end": cited.end,
            text: cited.text,
            "score": cited.score,
            "share": cited.share,
        }

    def source(row: RowCitation) -> dict[str, Any]:
        start, end, _ = quoted(document_of(row.document), row.token, row.token + 1, None)
        name = shown_name(row.document)
        return {"document": name, "start": start, "end": end, "share": row.share}

    sentences = recording.citations(sequence=sequence, num_tokens=num_tokens)
    passages = recording.citations("passage", sequence=sequence, num_tokens=num_tokens, top=None)
    by_tokens = None
    if by_token:
        rows = recording.token_citations(sequence=sequence, num_tokens=num_tokens)
        by_tokens = [
            {"text": text, "sources": [source(row) for row in of_token]}
            for text, of_token in zip(token_texts, rows or [[]] * num_tokens, strict=True)
        ]
    return AnswerSources(
        [place(each, "quote") | {"copied": each.copied} for each in sentences],
        [place(each, "text") for each in passages],
        by_tokens,
    )
