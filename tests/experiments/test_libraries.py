"""The documents of one memory: filled up to its size, changed facts of one article joined."""

import itertools
from dataclasses import replace

import pytest
from experiments.retrieval.joined import joined_versions
from experiments.retrieval.libraries import label_of, libraries_of

from emt.errors import ConfigError, CorpusError
from tests.experiments.fakes import Parrot, item

WORDS = " ".join(f"d{at}" for at in range(20))
TRUE = (
    "The mill was built in 1790 by Anna Berg, who had come to the valley from the coast. After "
    "some years of good harvests, in the dry summer of 1812, it burnt down to the last beam and "
    "was never again what it had been in its best years. Anna Berg sold it."
)


@pytest.fixture
def others(tmp_path):
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text(WORDS, encoding="utf-8")
    return [str(tmp_path)]


def test_memories_grow_and_have_exactly_their_size(others):
    items = [item("a"), item("b")]  # eleven words each
    libraries = libraries_of(items, [22, 30, 50], others, Parrot())
    assert [library.label for library in libraries] == ["0.022k", "0.03k", "0.05k"]
    sizes = [sum(len(text.split()) for _, text in one.documents) for one in libraries]
    assert sizes == [22, 30, 50]
    assert [one.items for one in libraries] == [items] * 3
    for smaller, larger in itertools.pairwise(libraries):
        assert larger.documents[: len(smaller.documents)] == smaller.documents
    texts = " ".join(text for _, text in libraries[2].documents[2:])
    assert texts.split() == (WORDS.split() * 2)[:28]
    names = [name for name, _ in libraries[2].documents]
    assert names[:3] == ["title a", "title b", "distractor x.txt"]
    assert names[3:] == ["distractor x.txt (continued)", "distractor y.txt"]


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
    labels = [label_of(size) for size in (3_000, 64_000, 256_000, 1_000_000, 1_500_000)]
    assert labels == ["3k", "64k", "256k", "1M", "1.5M"]


def changed(name, question, original, answer, text=TRUE):
    return replace(
        item(name, title="mill"),
        question=question,
        context=text.replace(original, answer),
        answer=answer,
        original_answer=original,
    )


WHO = changed("a", "Who built it?", "Anna Berg", "Eva Holm")
WHEN = changed("b", "When did it burn down?", "1812", "1834")


def test_questions_about_one_article_share_a_document_with_all_changes():
    other = item("c")
    again = changed("d", "Who had come from the coast?", "Anna Berg", "Eva Holm")
    text = TRUE.replace("Anna Berg", "Eva Holm").replace("1812", "1834")
    joined = [replace(one, context=text) for one in (WHO, WHEN, again)]
    assert joined_versions([WHO, other, WHEN, again]) == [joined[0], other, *joined[1:]]


def test_items_with_the_same_document_stay():
    first, second = item("a", title="t"), item("b", title="t", question="?")
    second = replace(second, context=first.context)
    assert joined_versions([first, second]) == [first, second]


def test_a_change_that_does_not_fit_is_left_out():
    again = changed("b", "Who built it?", "1812", "1834")  # the same question
    gone = changed("c", "Who sold it?", "Anna Berg", "Ida Lund")  # the first has changed it
    taken = changed("d", "When did it burn down?", "1812", "1790")  # the answer stands elsewhere
    elsewhere = changed(  # about another part of the article, with the same year
        "e", "When was it shut?", "1812", "1834", text="It was shut at last in the spring of 1812."
    )
    undoes = changed("f", "Whose was it?", "Eva Holm", "Anna Berg", text="It was Eva Holm's.")
    assert joined_versions([WHO, again, gone, taken, elsewhere, undoes]) == [WHO]


def test_words_are_changed_whole_and_nothing_of_the_original_may_be_left():
    text = TRUE + " No. 18123 of the register, a later hand, has the name ANNA BERG."
    when = changed("a", "When did it burn down?", "summer of 1812", "summer of 1834", text=text)
    built = replace(when, id="b", question="When was it built?", answer="1707")
    built = replace(built, original_answer="1790", context=text.replace("1790", "1707"))
    who = changed("c", "Who built it?", "Anna Berg", "Eva Holm", text=text)
    number = changed("d", "Which number?", "8123", "8345", text=text)
    joined = joined_versions([when, built, who, number])
    assert [one.id for one in joined] == ["a", "b"]
    assert joined[1].context == text.replace("1790", "1707").replace("of 1812", "of 1834")
