"""Routing by words: BM25 over the stored text, alone or beside the heads."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NamedTuple

import numpy as np

from emt.routing.bm25 import BM25
from emt.routing.evidence import Window, spaced
from emt.routing.terms import terms_of
from memory_backends import DocumentError, MemoryBackend, Scope, StoredDocument
from memory_backends.layout import Int64Array

_LENGTH, _STRIDE = 64, 32  # rows


class _Runs(NamedTuple):
    """The runs of rows of one document: their middles, counted from its first row, and words."""

    middles: list[int]
    words: list[Int64Array]


class _Index(NamedTuple):
    """The words of a memory as it was after so many changes.

    Attributes:
        middles: (r,) int64, the row in the middle of each run, ascending.
        documents: (r,) int64, the first row of the document of each run.
    """

    backend: MemoryBackend
    num_changes: int
    bm25: BM25
    middles: Int64Array
    documents: Int64Array


class WordIndex:
    """The words of all stored text, in runs of 64 rows of one document; threads may share it.

    Args:
        tokenizer: for documents that were written as ids; None leaves out their words.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._numbers: dict[str, int] = {}  # of words
        self._documents: dict[int, _Runs] = {}  # by their first row, which is not given out again
        self._index: _Index | None = None
        self._lock = threading.Lock()

    def windows(
        self,
        question: str,
        backend: MemoryBackend,
        count: int,
        *,
        min_distance: int,
        scope: Scope | None = None,
    ) -> list[Window]:
        """Find the runs of rows with most words of a question, as `best_windows` by evidence.

        Returns:
            Windows, best first; a score is the share of the weight of the question's words.
        """
        words = dict.fromkeys(terms_of(question))
        with self._lock:
            index = self._index_of(backend)
            numbers = [self._numbers.get(word) for word in words]
        scores = index.bm25.scores(numbers)
        if scope is not None:
            is_inside = np.zeros(len(scores), dtype=bool)
            for span in scope.spans:
                first, stop = np.searchsorted(index.middles, span)
                is_inside[first:stop] = True
            scores[~is_inside] = 0
        found = np.flatnonzero(scores)
        ranked = found[np.argsort(-scores[found], kind="stable")]
        windows = (
            Window(int(index.middles[i]), float(scores[i]), int(index.documents[i])) for i in ranked
        )
        return spaced(windows, count, min_distance=min_distance)

    def _index_of(self, backend: MemoryBackend) -> _Index:
        """Return the index of a memory as it is now, for which only new documents are read."""
        index = self._index
        if index is None or index.backend is not backend:
            self._numbers, self._documents = {}, {}
        elif index.num_changes == backend.num_changes:
            return index
        self._index = index = self._indexed(backend)
        return index

    def _indexed(self, backend: MemoryBackend) -> _Index:
        num_changes, catalog = backend.num_changes, backend.catalog
        with catalog.snapshot():
            names = dict(zip(catalog.first_rows().tolist(), catalog.document_names(), strict=True))
        known, self._documents = self._documents, {}
        for first_row, name in names.items():
            with contextlib.suppress(DocumentError):  # another process has removed it
                runs = known.get(first_row) or self._runs_of(catalog.document(name))
                self._documents[first_row] = runs
        every = list(self._documents.values())
        middles = np.array([middle for runs in every for middle in runs.middles], dtype=np.int64)
        num_runs = np.array([len(runs.middles) for runs in every], dtype=np.int64)
        documents = np.repeat(np.array(list(self._documents), dtype=np.int64), num_runs)
        bm25 = BM25([words for runs in every for words in runs.words], len(self._numbers))
        return _Index(backend, num_changes, bm25, documents + middles, documents)

    def _runs_of(self, document: StoredDocument) -> _Runs:
        num_rows, runs = len(document.row_tokens), _Runs([], [])
        for start in range(0, max(num_rows - _STRIDE, 1), _STRIDE):
            stop = min(start + _LENGTH, num_rows)
            words = terms_of(text_of_rows(document, start, stop, self._tokenizer))
            numbers = [self._numbers.setdefault(word, len(self._numbers)) for word in words]
            runs.middles.append((start + stop) // 2)
            runs.words.append(np.array(numbers, dtype=np.int64))
        return runs


def text_of_rows(document: StoredDocument, start: int, stop: int, tokenizer: Any) -> str:
    """Return the text of some rows; decoded if the document was written as ids."""
    tokens = document.row_tokens[start:stop]
    if document.text is None or document.offsets is None:
        return "" if tokenizer is None else str(tokenizer.decode(document.token_ids[tokens]))
    spans = document.offsets[tokens]
    stands = spans[spans[:, 1] > spans[:, 0]]  # a special token stands nowhere in the text
    return document.text[int(stands[0, 0]) : int(stands[-1, 1])] if len(stands) else ""
