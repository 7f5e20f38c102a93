"""BM25 over texts whose words are numbers: made and searched in a few array operations.

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework (2009), with Lucene's idf.
What a word is worth in each text is computed beforehand, as in Lù, BM25S (arXiv 2407.03618).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from memory_backends.layout import Int64Array

_K1, _B = 1.5, 0.75
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BM25:
    """Which texts have a word, and how much that says.

    Attributes:
        num_texts: how many texts there are.
        idf: (V + 1,) float32, the weight of each word; the last is that of a word in no text.
        begins: (V + 1,) int64, where the texts of each word begin in the arrays that follow.
        texts: (P,) int64, the texts that have a word, ascending for each.
        shares: (P,) float32, what that is worth, of the word's weight: below 1.
    """

    num_texts: int
    idf: Float32Array
    begins: Int64Array
    texts: Int64Array
    shares: Float32Array

    @classmethod
    def of(cls, texts: Sequence[Int64Array], num_words: int) -> Self:
        """Index texts, each (n,) int64 words from 0 to `num_words` - 1, in any order."""
        lengths = np.array(list(map(len, texts)), dtype=np.int64)
        words = np.concatenate([np.empty(0, dtype=np.int64), *texts])
        in_text = np.repeat(np.arange(len(texts)), lengths)
        pairs, counts = np.unique(words * len(texts) + in_text, return_counts=True)
        word, text = np.divmod(pairs, max(len(texts), 1))
        relative = lengths / max(lengths.mean(), 1) if len(texts) else lengths
        shares = counts / (counts + _K1 * (1 - _B + _B * relative[text]))
        num_with = np.bincount(word, minlength=num_words + 1)
        idf = np.log1p((len(texts) - num_with + 0.5) / (num_with + 0.5))
        begins = np.searchsorted(word, np.arange(num_words + 1))
        return cls(len(texts), idf.astype(np.float32), begins, text, shares.astype(np.float32))

    def scores(self, words: Collection[int | None]) -> Float32Array:
        """Score the texts by some words: (num_texts,) float32, 0 to 1.

        A score is the share of the weight of all words; each counts once. None is a word that the
        vocabulary does not have.
        """
        scores = np.zeros(self.num_texts, dtype=np.float32)
        total = 0.0
        for word in words:
            total += float(self.idf[-1 if word is None else word])
            if word is not None:
                found = slice(self.begins[word], self.begins[word + 1])
                scores[self.texts[found]] += self.idf[word] * self.shares[found]
        return scores / total if total else scores
