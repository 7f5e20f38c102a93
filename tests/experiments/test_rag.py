import math
import re

import pytest
from experiments.rag import BM25, Chunks

from emt.errors import ConfigError
from tests.experiments.fakes import Parrot

TEXTS = [
    "whales swim near hull harbour harbour",
    "ships sail from hull",
    "rain fell over leeds while ships waited and waited again",
    "harbour lights shine",
    "nothing happened",
]


def by_hand(texts, question, k1=1.5, b=0.75):
    """Score texts by BM25 with Lucene's inverse document frequency, straight from the formula."""
    documents = [re.findall(r"\b\w\w+\b", text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        score = 0.0
        for word in re.findall(r"\b\w\w+\b", question):
            count = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - count + 0.5) / (count + 0.5))
            tf = words.count(word)
            score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("question", ["harbour hull", "ships leeds waited", "lights harbour rain"])
def test_bm25_ranks_as_the_formula_does(question):
    expected = by_hand([text.replace("and ", "").replace("while ", "") for text in TEXTS], question)
    found = BM25(TEXTS).best(question, 3)
    ranked = sorted(range(len(TEXTS)), key=lambda index: -expected[index])
    matching = [index for index in ranked if expected[index] > 0][:3]
    assert len(matching) >= 2
    assert found[: len(matching)] == matching


def test_it_returns_all_there_are_and_each_once():
    assert sorted(BM25(TEXTS).best("harbour", 99)) == [0, 1, 2, 3, 4]
    assert len(BM25(TEXTS).best("zebra", 2)) == 2
    assert BM25(["the"]).best("the", 5) == [0]


def test_chunks_are_of_one_document_each():
    chunks = Chunks(["a1 a2 a3 a4 a5", "b1 b2"], Parrot(), 2)
    assert [chunk.split() for chunk in chunks.texts] == [
        ["a1", "a2"],
        ["a3", "a4"],
        ["a5"],
        ["b1", "b2"],
    ]
    assert chunks.best("where is b2", 1) == ["b1 b2"]


class Longest:
    """Takes the longest texts first, whatever the question."""

    def __init__(self, texts):
        self.texts = texts

    def best(self, question, count):
        return sorted(range(len(self.texts)), key=lambda at: -len(self.texts[at]))[:count]


def test_a_retriever_of_one_s_own_by_its_name():
    chunks = Chunks(TEXTS, Parrot(), 100, f"{__name__}:Longest")
    assert chunks.best("harbour", 2) == [TEXTS[2], TEXTS[0]]


@pytest.mark.parametrize("name", ["dense", "no.such:Thing", "json:loads", "json:None"])
def test_a_retriever_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=f"retriever .*{name}"):
        Chunks(TEXTS, Parrot(), 100, name)
