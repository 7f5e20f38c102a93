"""Routing by words: BM25 over the stored text."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import Any, NamedTuple

import numpy as np

from emt.routing.bm25 import BM25
from emt.routing.runs import Runs, runs_of
from emt.routing.terms import terms_of
from memory_backends import DocumentError, MemoryBackend, Scope, StoredDocument
from memory_backends.layout import Float32Array, Int64Array

_SCOPES_KEPT = 16  # whose words are kept counted


class _Index(NamedTuple):
    """The words of a scope: of texts out of it nothing is known, not even how rare a word is."""

    bm25: BM25
    runs: Runs


class _Document(NamedTuple):
    """How many rows a document has, and the words of each of its runs."""

    num_rows: int
    words: list[Int64Array]


class WordIndex:
    """The words of all stored text, in runs of 64 rows of one document; threads may share it.

    Args:
        tokenizer: for documents that were written as ids; None leaves out their words.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._numbers: dict[str, int] = {}  # of words
        self._documents: dict[
            int, _Document
        ] = {}  # by their first row, which is not given out again
        self._read: tuple[MemoryBackend, int] | None = None  # of which memory, after which change
        self._runs = Runs.of({})
        self._indexes: dict[Scope | None, _Index] = {}  # the last used is the last
        self._lock = threading.Lock()

    def scores(
        self, question: str, backend: MemoryBackend, scope: Scope | None = None
    ) -> tuple[Runs, Float32Array]:
        """Return the runs of a scope, and the share of a question's words that is in each.

        Words count by how much they say in the scope. By how much they say in the whole memory, who
        sees a part of it could find out which words are in the others.

        Returns:
            The r runs, of the whole memory if there is no scope, and (r,) float32, 0 to 1.

        Source:
            Büttcher and Clarke, A Security Model for Full-Text File System Search in Multi-User
            Environments (FAST 2005).
        """
        words = dict.fromkeys(terms_of(question))
        with self._lock:
            index = self._index_of(backend, scope)
            numbers = [self._numbers.get(word) for word in words]
        return index.runs, index.bm25.scores(numbers)

    def _index_of(self, backend: MemoryBackend, scope: Scope | None) -> _Index:
        """Return the index of a scope as it is now, for which only new documents are read."""
        if self._read is None or self._read[0] is not backend:
            self._numbers, self._documents = {}, {}
        if self._read != (backend, backend.num_changes):
            self._read = None
            num_changes = backend.num_changes
            self._read_documents(backend)
            self._indexes = {}
            self._read = backend, num_changes
        index = self._indexes.pop(scope, None) or self._indexed(scope)
        self._indexes[scope] = index
        if len(self._indexes) > _SCOPES_KEPT:
            del self._indexes[next(iter(self._indexes))]
        return index

    def _read_documents(self, backend: MemoryBackend) -> None:
        catalog = backend.catalog
        with catalog.snapshot():
            names = dict(zip(catalog.first_rows().tolist(), catalog.document_names(), strict=True))
        documents: dict[int, _Document] = {}
        for first_row, name in names.items():
            with contextlib.suppress(DocumentError):  # another process has removed it
                known = self._documents.get(first_row)
                documents[first_row] = known or self._words_of(catalog.document(name))
        self._documents = documents
        self._runs = Runs.of({first: document.num_rows for first, document in documents.items()})

    def _indexed(self, scope: Scope | None) -> _Index:
        words = [words for document in self._documents.values() for words in document.words]
        if scope is None:
            return _Index(BM25(words, len(self._numbers)), self._runs)
        inside = self._runs.inside(scope)
        words = list(itertools.compress(words, inside))
        return _Index(BM25(words, len(self._numbers)), self._runs.among(inside))

    def _words_of(self, document: StoredDocument) -> _Document:
        num_rows = len(document.row_tokens)
        of_runs: list[Int64Array] = []
        for start, stop in runs_of(num_rows).tolist():
            words = terms_of(text_of_rows(document, start, stop, self._tokenizer))
            numbers = [self._numbers.setdefault(word, len(self._numbers)) for word in words]
            of_runs.append(np.array(numbers, dtype=np.int64))
        return _Document(num_rows, of_runs)


def text_of_rows(document: StoredDocument, start: int, stop: int, tokenizer: Any) -> str:
    """Return the text of some rows; decoded if the document was written as ids."""
    tokens = document.row_tokens[start:stop]
    if document.text is None or document.offsets is None:
        return "" if tokenizer is None else str(tokenizer.decode(document.token_ids[tokens]))
    spans = document.offsets[tokens]
    stands = spans[spans[:, 1] > spans[:, 0]]  # a special token stands nowhere in the text
    return document.text[int(stands[0, 0]) : int(stands[-1, 1])] if len(stands) else ""
