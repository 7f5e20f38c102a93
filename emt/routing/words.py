"""Routing by words: BM25 over the stored text, alone or beside the heads."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from emt.errors import ConfigError
from emt.routing.evidence import Window, spaced
from memory_backends import MemoryBackend, Scope, StoredDocument

_LENGTH, _STRIDE = 64, 32  # rows


class WordIndex:
    """The words of all stored text, in runs of 64 rows.

    Args:
        backend: where the documents are.
        tokenizer: for documents that were written as ids; None leaves them out.

    Raises:
        ConfigError: bm25s is not installed.

    Source:
        Lù, BM25S (arXiv 2407.03618); its defaults k1 = 1.5, b = 0.75, English stop words left out.
    """

    def __init__(self, backend: MemoryBackend, tokenizer: Any) -> None:
        self._library = bm25s_for("routing by words", instead=", or set routing to heads")
        self._backend, self._num_changes = backend, backend.num_changes
        texts: list[str] = []
        middles: list[int] = []
        for name in backend.catalog.document_names():
            document = backend.catalog.document(name)
            num_rows = len(document.row_tokens)
            for start in range(0, max(num_rows - _STRIDE, 1), _STRIDE):
                stop = min(start + _LENGTH, num_rows)
                texts.append(_text_of_rows(document, start, stop, tokenizer))
                middles.append(document.first_row + (start + stop) // 2)
        self._middles = np.array(middles, dtype=np.int64)
        self._index = None  # stop words only: nothing to rank by
        words = self._words(texts)
        if any(len(ids) for ids in words.ids):
            self._index = self._library.BM25()
            self._index.index(words, show_progress=False)

    def is_current(self, backend: MemoryBackend) -> bool:
        """Tell whether a backend has the documents that were indexed, and no others."""
        return self._backend is backend and self._num_changes == backend.num_changes

    def windows(
        self, question: str, count: int, *, min_distance: int, scope: Scope | None = None
    ) -> list[Window]:
        """Find the runs of rows with most words of a question, as `best_windows` by evidence.

        Returns:
            Windows, best first; their scores are shares of the best one's BM25 score.
        """
        words = self._words([question])
        if self._index is None or not any(len(ids) for ids in words.ids):
            return []
        k = min(8 * count, len(self._middles))
        mask = None
        if scope is not None:
            mask = np.zeros(len(self._middles), dtype=np.float32)
            for first, stop in scope.spans:
                low, high = np.searchsorted(self._middles, (first, stop))
                mask[low:high] = 1
        ranked = self._index.retrieve(words, k=k, show_progress=False, weight_mask=mask)
        best = float(ranked.scores[0, 0])
        windows = (
            Window(int(self._middles[int(index)]), float(score) / best)
            for index, score in zip(ranked.documents[0], ranked.scores[0], strict=True)
            if score > 0
        )
        return spaced(windows, count, min_distance=min_distance)

    def _words(self, texts: list[str]) -> Any:
        return self._library.tokenize(texts, stopwords="en", show_progress=False)


def bm25s_for(purpose: str, *, instead: str = "") -> Any:
    """Import bm25s.

    Raises:
        ConfigError: bm25s is not installed; names the purpose and what to do instead.
    """
    try:
        return importlib.import_module("bm25s")
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs bm25s. Install it with `pip install 'emt[experiments]'`{instead}."
        ) from error


def _text_of_rows(document: StoredDocument, start: int, stop: int, tokenizer: Any) -> str:
    tokens = document.row_tokens[start:stop]
    if document.text is None or document.offsets is None:
        return "" if tokenizer is None else str(tokenizer.decode(document.token_ids[tokens]))
    spans = document.offsets[tokens]
    return document.text[int(spans[0, 0]) : int(spans[-1, 1])]
