import itertools

import pytest
from experiments.retrieval.many_documents import label_of, libraries_of

from emt.errors import ConfigError, CorpusError
from tests.experiments.fakes import Parrot, item

WORDS = " ".join(f"d{at}" for at in range(20))


@pytest.fixture
def others(tmp_path):
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text(WORDS, encoding="utf-8")
    return [str(tmp_path)]


def test_memories_grow_and_have_exactly_their_size(others):
    items = [item("a"), item("b")]  # eleven words each
    found = libraries_of(items, [22, 30, 50], others, Parrot())
    assert [library.label for library in found] == ["0.022k", "0.03k", "0.05k"]
    assert [sum(len(text.split()) for _, text in one.documents) for one in found] == [22, 30, 50]
    assert [one.items for one in found] == [items] * 3
    for smaller, larger in itertools.pairwise(found):
        assert larger.documents[: len(smaller.documents)] == smaller.documents
    texts = " ".join(text for _, text in found[2].documents[2:])
    assert texts.split() == (WORDS.split() * 2)[:28]
    names = [name for name, _ in found[2].documents]
    assert names == [
        "title a",
        "title b",
        "distractor x.txt",
        "distractor x.txt (continued)",
        "distractor y.txt",
    ]


def test_items_without_room_are_left_out_and_one_document_counts_once():
    twice = item("b", title="title a", context=item("a").context)
    (library,) = libraries_of([item("a"), twice, item("c")], [11], [], Parrot())
    assert library.items == [item("a"), twice]
    assert library.documents == [("title a", item("a").context)]


def test_too_little_of_anything_is_refused(others, tmp_path):
    with pytest.raises(ConfigError, match="no item's document fits a memory of 5 tokens"):
        libraries_of([item("a")], [5], others, Parrot())
    with pytest.raises(ConfigError, match=r"of 60 tokens needs more texts: .* have 51"):
        libraries_of([item("a")], [20, 60], others, Parrot())
    with pytest.raises(CorpusError, match="does not exist"):
        libraries_of([item("a")], [20], [str(tmp_path / "no.txt")], Parrot())


def test_labels():
    assert [label_of(size) for size in (3_000, 64_000, 256_000, 1_000_000, 1_500_000)] == [
        "3k",
        "64k",
        "256k",
        "1M",
        "1.5M",
    ]
