"""Rows expanded to passages: whole sentences, within the budget."""

import numpy as np
import pytest

from emt.passage import Passage
from emt.routing.expansion import Candidate, passages_around
from memory_backends import StoredDocument


def of_sentences(lengths, name="d"):
    """Return a document of sentences with so many words, a token and a row a word."""
    words, spans, at = [], [], 0
    for number, length in enumerate(lengths):
        for place in range(length):
            word = f"S{number}w{place}" + ("." if place == length - 1 else "")
            words.append(word)
            spans.append((at, at + len(word)))
            at += len(word) + 1
    count = len(words)
    return StoredDocument(
        name,
        np.arange(count, dtype=np.int32),
        " ".join(words),
        np.array(spans, dtype=np.int32),
        first_row=100,
        row_tokens=np.arange(count, dtype=np.int32),
    )


def ids_only(count, dropped=()):
    kept = np.setdiff1d(np.arange(count), dropped).astype(np.int32)
    return StoredDocument("d", np.arange(count, dtype=np.int32), row_tokens=kept)


def around(places, num_rows):
    return passages_around([Candidate(*place) for place in places], num_rows)


def passage_around(document, peak, num_rows):
    ((ranks, passage),) = around([(document, peak)], num_rows)
    assert ranks == [0]
    return passage


LENGTHS = [5, 7, 3, 9, 6, 20, 4]


@pytest.mark.parametrize("num_rows", [1, 3, 5, 8, 12, 20, 24, 40, 53, 54, 100])
def test_sentences_are_whole(num_rows):
    document = of_sentences(LENGTHS)
    bounds = np.cumsum([0, *LENGTHS]).tolist()
    for peak in range(54):
        passage = passage_around(document, peak, num_rows)
        assert 0 <= passage.first <= peak < passage.stop <= 54
        assert passage.stop - passage.first <= num_rows
        own = next(i for i in range(7) if bounds[i] <= peak < bounds[i + 1])
        if LENGTHS[own] > num_rows:
            assert passage.stop - passage.first == num_rows
            assert bounds[own] <= passage.first
            assert passage.stop <= bounds[own + 1]
            continue
        assert passage.first in bounds
        assert passage.stop in bounds
        # No sentence beside it would have fitted.
        low, high = bounds.index(passage.first), bounds.index(passage.stop)
        assert low == 0 or passage.stop - bounds[low - 1] > num_rows
        assert high == 7 or bounds[high + 1] - passage.first > num_rows


def test_the_sentence_after_comes_before_the_one_before():
    document = of_sentences([5, 5, 5, 5])
    assert passage_around(document, 7, 10) == Passage("d", 5, 15)
    assert passage_around(document, 7, 15) == Passage("d", 0, 15)
    assert passage_around(document, 17, 10) == Passage("d", 10, 20)


def test_documents_of_ids_have_runs_for_sentences():
    assert passage_around(ids_only(100), 40, 32) == Passage("d", 32, 64)
    assert passage_around(ids_only(100), 99, 40) == Passage("d", 64, 100)
    # Ten special ids have no row: runs of 32 tokens are runs of 22 rows and more.
    assert passage_around(ids_only(100, range(10)), 0, 32) == Passage("d", 0, 22)
    assert passage_around(ids_only(100, range(10)), 22, 32) == Passage("d", 22, 54)
    assert passage_around(ids_only(1), 0, 5) == Passage("d", 0, 1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_rows", [6, 20, 60, 200])
def test_passages_of_several_places(seed, num_rows):
    rng = np.random.default_rng(seed)
    lengths = {name: rng.integers(1, 15, 40).tolist() for name in "ab"}
    documents = {name: of_sentences(of_one, name) for name, of_one in lengths.items()}
    places = [
        (documents[name], int(rng.integers(sum(lengths[name]))))
        for name in rng.choice(["a", "b"], 3).tolist()
    ]
    expanded = around(places, num_rows)
    rows = [(p.document, row) for _, p in expanded for row in range(p.first, p.stop)]
    assert len(set(rows)) == len(rows) <= num_rows
    assert expanded[0][0][0] == 0
    assert [ranks for ranks, _ in expanded] == sorted(ranks for ranks, _ in expanded)
    for ranks, passage in expanded:
        inside = [
            rank
            for rank, (document, peak) in enumerate(places)
            if document.name == passage.document and passage.first <= peak < passage.stop
        ]
        assert ranks == inside != []
    bounds = {name: set(np.cumsum([0, *of_one]).tolist()) for name, of_one in lengths.items()}
    document, best = places[0][0], expanded[0][1]
    if {best.first, best.stop} <= bounds[document.name]:
        for _, passage in expanded:
            assert {passage.first, passage.stop} <= bounds[passage.document]
    else:  # the best place's sentence is too long, and nothing else is taken
        assert len(expanded) == 1
        assert best.stop - best.first == num_rows
        assert not bounds[document.name] & set(range(best.first + 1, best.stop))


def test_places_near_each_other_are_joined():
    sentences = of_sentences([10] * 40)
    expanded = around([(sentences, 105), (sentences, 145)], 100)
    assert expanded == [([0, 1], Passage("d", 70, 170))]
    # Far from each other, the better one has more rows.
    expanded = around([(sentences, 55), (sentences, 305)], 100)
    assert [ranks for ranks, _ in expanded] == [[0], [1]]
    first, second = (passage.stop - passage.first for _, passage in expanded)
    assert (first, second) == (60, 40)


def test_the_best_place_has_its_sentence_though_others_are_nearer():
    long, short = of_sentences([4, 60, 4], "long"), of_sentences([5] * 20, "short")
    assert around([(long, 5), (short, 50)], 60) == [([0], Passage("long", 4, 64))]
    expanded = around([(long, 5), (short, 50)], 70)
    assert expanded[0] == ([0], Passage("long", 0, 64))
    assert expanded[1] == ([1], Passage("short", 50, 55))


def test_a_place_at_the_end_of_a_long_sentence_has_what_follows():
    far, near = of_sentences([10] * 40, "far"), of_sentences([10, 50, 10, 10, 50], "near")
    expanded = around([(far, 205), (near, 58)], 200)
    # The sentences after it are nearer than the beginning of its own, and come after that.
    assert expanded == [([0], Passage("far", 140, 270)), ([1], Passage("near", 10, 80))]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_every_one_of_several_places_has_rows_and_the_best_has_most(count):
    sentences = of_sentences([1] * 4000)
    expanded = around([(sentences, 250 + 400 * i) for i in range(count)], 400)
    assert [ranks for ranks, _ in expanded] == [[i] for i in range(count)]
    lengths = [passage.stop - passage.first for _, passage in expanded]
    assert sum(lengths) == 400
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == pytest.approx(400 * (0.6 if count == 2 else 1.6 / count), abs=3)


def test_places_in_one_sentence_are_one_passage():
    sentences = of_sentences([6] * 9)
    assert around([(sentences, 26), (sentences, 24), (sentences, 29)], 6) == [
        ([0, 1, 2], Passage("d", 24, 30))
    ]
    long = of_sentences([100])
    expanded = around([(long, 50), (long, 90), (long, 47)], 10)
    assert expanded == [([0, 2], Passage("d", 45, 55))]
