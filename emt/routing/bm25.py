"""BM25 over texts whose words are numbers, by bm25s, with scores that are shares.

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework (2009), with Lucene's idf; Lù,
BM25S (arXiv 2407.03618).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import bm25s
import numpy as np

from memory_backends.layout import Float32Array, Int64Array


class BM25:
    """Which texts have a word, and how much that says.

    Args:
        texts: each (n,) int64 words from 0 to `num_words` - 1, in any order.
        num_words: how many words there are.
    """

    def __init__(self, texts: Sequence[Int64Array], num_words: int) -> None:
        self._num_texts = len(texts)
        num_with = np.zeros(num_words + 1)  # texts that have each word; the last is in none
        for words in texts:
            num_with[np.unique(words)] += 1
        self._weights = np.log1p((len(texts) - num_with + 0.5) / (num_with + 0.5))
        self._index = None  # bm25s cannot index texts without words
        if any(len(words) for words in texts):
            self._index = bm25s.BM25()
            vocabulary = {number: number for number in range(num_words)}
            self._index.index((texts, vocabulary), create_empty_token=False, show_progress=False)

    def scores(self, words: Collection[int | None]) -> Float32Array:
        """Score the texts by some words: (number of texts,) float32, 0 to 1.

        A score is the share of the weight of all words; each counts once. None is a word that the
        vocabulary does not have.
        """
        known = [word for word in words if word is not None]
        total = float(sum(self._weights[-1 if word is None else word] for word in words))
        if self._index is None or not known:
            return np.zeros(self._num_texts, dtype=np.float32)
        scores: Float32Array = self._index.get_scores_from_ids(known)
        return scores / np.float32(total)
