"""Chunks of a memory's documents, ranked by words, by an embedding model, or by both."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from experiments.comparison.dense import Dense
from experiments.comparison.sets import Text
from experiments.rag import BM25
from experiments.responder import Responder
from experiments.spans import Span

Scores = npt.NDArray[np.floating]
_RANK_OFFSET = 60  # of reciprocal rank fusion


class Scorer(Protocol):
    """Tells how well texts suit a question."""

    def scores(self, question: str) -> Scores:
        """Return the score of each text, (n,); more is better, 0 or less is no hit at all."""


class Chunk(NamedTuple):
    """A piece of a document, and where it stands."""

    span: Span
    text: str


class Chunks:
    """Documents in chunks of equal length, ready to be ranked.

    Args:
        documents: a chunk is never of two.
        responder: the model whose tokens are counted.
        num_tokens: length of a chunk.
        embedding_model: a folder, for the retrievers "dense" and "hybrid".
        folder: keeps the embeddings, which take long to compute.
    """

    def __init__(
        self,
        documents: Iterable[Text],
        responder: Responder,
        num_tokens: int,
        *,
        embedding_model: str | None,
        folder: Path,
    ) -> None:
        self._chunks: list[Chunk] = []
        for name, text, _ in documents:
            start = 0
            for piece in responder.split(text, num_tokens):
                span = Span(name, start, start + len(piece))
                self._chunks.append(Chunk(span, piece))
                start = span.stop
        self._embedding_model = embedding_model
        self._folder = folder

    def prepare(self, retriever: str) -> None:
        """Make what a retriever needs, so that no question's time has it."""
        self._scorers(retriever)

    def best(
        self, retriever: str, question: str, count: int, documents: Collection[str] | None = None
    ) -> list[Chunk]:
        """Return the best chunks, best first.

        Args:
            retriever: "bm25", "dense" or "hybrid".
            question: what is asked.
            count: how many there are at most.
            documents: those whose chunks may be found; None for all.
        """
        allowed = np.array(
            [
                at
                for at, chunk in enumerate(self._chunks)
                if documents is None or chunk.span.document in documents
            ],
            dtype=np.int64,
        )
        scores = [scorer.scores(question)[allowed] for scorer in self._scorers(retriever)]
        order = np.argsort(-fused(scores), kind="stable")[:count]
        return [self._chunks[at] for at in allowed[order]]

    def _scorers(self, retriever: str) -> list[Scorer]:
        """Return what a retriever ranks by; "hybrid" by both."""
        names = ("bm25", "dense") if retriever == "hybrid" else (retriever,)
        return [self._bm25 if name == "bm25" else self._dense for name in names]

    @functools.cached_property
    def _bm25(self) -> BM25:
        return BM25(self._texts)

    @functools.cached_property
    def _dense(self) -> Dense:
        return Dense(self._texts, str(self._embedding_model), self._folder)

    @property
    def _texts(self) -> list[str]:
        return [chunk.text for chunk in self._chunks]


def fused(rankings: Sequence[Scores]) -> Scores:
    """Join scores (n,) of several rankings by reciprocal rank; what is no hit counts nothing.

    Source:
        Cormack, Clarke and Büttcher, Reciprocal Rank Fusion outperforms Condorcet and individual
        Rank Learning Methods (SIGIR 2009).
    """
    total = np.zeros(len(rankings[0]))
    for scores in rankings:
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > 0]
        total[order] += 1 / (_RANK_OFFSET + 1 + np.arange(len(order)))
    return total
