"""BM25 against the formula, in loops."""

import math

import numpy as np
import pytest

from emt.routing.bm25 import BM25


def by_hand(texts, words):
    mean = sum(map(len, texts)) / len(texts)
    idf = {}
    for word in words:
        count = sum(word in text for text in texts)
        idf[word] = math.log(1 + (len(texts) - count + 0.5) / (count + 0.5))
    scores = []
    for text in texts:
        norm = 1.5 * (0.25 + 0.75 * len(text) / mean)
        worth = [idf[word] * text.count(word) / (text.count(word) + norm) for word in words]
        scores.append(sum(worth) / sum(idf.values()))
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_formula(seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 30, rng.integers(0, 40)) for _ in range(50)]
    bm25 = BM25.of(texts, 32)
    lists = [text.tolist() for text in texts]
    for words in ([3], [1, 5, 29], [30, 2], list(range(31))):
        np.testing.assert_allclose(bm25.scores(words), by_hand(lists, words), rtol=1e-5)
    unknown = by_hand(lists, [4, "unknown"])
    np.testing.assert_allclose(bm25.scores([4, None]), unknown, rtol=1e-5)


def test_nothing_to_score():
    assert BM25.of([], 0).scores([None]).tolist() == []
    no_words = BM25.of([np.empty(0, dtype=np.int64)] * 2, 0)
    assert no_words.scores([None]).tolist() == [0, 0]
    assert no_words.scores([]).tolist() == [0, 0]
