"""Question sets read and refused, and the memories that are filled with their documents."""

import itertools

import pytest
from experiments.comparison.memories import filled_memories, size_name
from experiments.comparison.sets import SETS, read_set
from experiments.spans import Span, covers

from emt.errors import ConfigError, CorpusError, DocumentError
from tests.experiments.fakes import Parrot
from tests.experiments.question_sets import (
    NAMES,
    asking_about,
    documents_of_words,
    unanswerable,
    write_set,
)

QUESTIONS = [asking_about(name, at) for name in NAMES for at in (20, 50)]


def cut(text, length):
    words = Parrot().split(text, 1)
    return "".join(words[:length]), len(words[:length])


@pytest.fixture
def words(tmp_path):
    return write_set(tmp_path / "words", [*QUESTIONS, unanswerable()], documents_of_words())


@pytest.fixture
def others(tmp_path):
    (tmp_path / "others").mkdir()
    for name in ("x.txt", "y.txt"):
        (tmp_path / "others" / name).write_text(" ".join(f"d{at}" for at in range(20)))
    return [str(tmp_path / "others")]


def filled(sets, sizes, others=(), together=False):
    sets = [read_set(one) for one in sets]
    return list(filled_memories(sets, together=together, sizes=sizes, distractors=others, cut=cut))


def test_evidence_is_found_in_its_document(words):
    one = read_set(words)
    assert (one.name, one.documents_of, list(one.documents)) == ("words", "words", list(NAMES))
    assert one.documents["two"].metadata == {"year": 2001}
    assert len(one.questions) == 7
    for question, given in itertools.product(one.questions, QUESTIONS):
        if question.id == given["id"]:
            (span,) = question.evidence
            text = one.documents[span.document].text[span.start : span.stop]
            assert text == given["evidence"][0]["text"]
            assert question.candidates == given["answers"]


def test_a_set_may_ask_about_the_documents_of_another(words, tmp_path):
    folder = write_set(tmp_path / "other", [QUESTIONS[3]], documents_of="words")
    other = read_set(folder)
    assert (other.name, other.documents_of) == ("other", "words")
    assert other.documents == read_set(words).documents
    (memory,) = filled([words, folder], None)
    assert [one.set for one in memory.questions] == ["words"] * 7 + ["other"]
    assert memory.label == "words-own"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": "w3"}, "row 1: 'answers' must be a list of texts; got 'w3'"),
        ({"answers": []}, "row 1: has answers without evidence, or the other way round"),
        ({"evidence": {}}, "row 1: 'evidence' must be a list"),
        ({"where": 3}, "row 1: where must be a mapping"),
        ({"where": {"year": {}}}, "row 1: where must compare keys with text"),
        ({"question": " "}, "row 1: 'question' must be text"),
        ({"evidence": [{"document": "four", "text": "w3"}]}, "there is no document 'four'"),
        ({"evidence": [{"document": "one", "text": "w"}]}, "'w' stands there 80 times"),
        ({"evidence": [{"document": "one", "text": "nothing"}]}, "stands there 0 times"),
        ({"evidence": [{"document": "one"}]}, "'text' must be text; got nothing"),
        ({"evidence": ["w3"]}, "'evidence' must be a list of objects"),
        ({"kind": 3}, "row 1: 'kind' must be text"),
        ({"original": QUESTIONS[0]["answers"][0]}, "is an answer"),
    ],
)
def test_a_wrong_question_is_refused(tmp_path, changes, said):
    question = {**asking_about("one", 20), **changes}
    folder = write_set(tmp_path / "wrong", [question], documents_of_words())
    with pytest.raises(DocumentError) as caught:
        read_set(folder)
    assert said in str(caught.value)


def test_a_wrong_set_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a folder with a questions"):
        read_set("nowhere")
    twice = write_set(tmp_path / "twice", [QUESTIONS[0]] * 2, documents_of_words())
    with pytest.raises(DocumentError, match="id 'one-20' comes twice"):
        read_set(twice)
    double = write_set(tmp_path / "double", QUESTIONS, documents_of_words() * 2)
    with pytest.raises(DocumentError, match="a document 'one' comes twice"):
        read_set(double)
    lost = write_set(tmp_path / "lost", [QUESTIONS[0]], documents_of="nowhere")
    with pytest.raises(ConfigError, match="got 'nowhere'"):
        read_set(lost)
    anonymous = write_set(tmp_path / "anonymous", QUESTIONS, documents_of_words(), source="")
    with pytest.raises(ConfigError, match="must say what the set is, and its source and licence"):
        read_set(anonymous)


def test_memories_have_exactly_their_size_and_the_same_questions(words, others):
    small, large = filled([words], [240 + 5, 240 + 30], others)
    assert (small.label, large.label) == ("words-0.245k", "words-0.27k")
    assert [one.name for one in small.documents[:3]] == list(
        dict.fromkeys(name for one in small.questions for name in one.documents)
    )
    assert [sum(len(one.text.split()) for one in each.documents) for each in (small, large)] == [
        245,
        270,
    ]
    assert [one.name for one in large.documents[3:]] == ["distractor x.txt", "distractor y.txt"]
    assert small.questions == large.questions
    with pytest.raises(ConfigError, match="a memory needs more texts: 20 tokens are missing"):
        filled([words], [300], others)
    with pytest.raises(CorpusError, match="does not exist"):
        filled([words], [300], ["nowhere.txt"])


def test_questions_whose_documents_have_no_room_are_left_out(words, tmp_path, others):
    (memory,) = filled([words], [170], others)
    asked = {name for one in memory.questions for name in one.documents}
    assert asked == {one.name for one in memory.documents[:2]}
    assert len(memory.questions) == 5  # four, and the one that nothing answers
    assert memory.left_out == {"words": 2}
    sure = write_set(tmp_path / "sure", QUESTIONS[:1], documents_of_words())
    with pytest.raises(ConfigError, match="no document that set 'sure' asks about has room"):
        filled([sure], [70], others)


def test_sets_may_share_a_memory(words, tmp_path, others):
    rows = [{"name": "one", "text": "w3 w4"}]
    question = {**QUESTIONS[0], "evidence": [{"document": "one", "text": "w3"}]}
    clash = write_set(tmp_path / "clash", [question], rows)
    assert [one.name for one in filled([words, clash], None)] == ["words", "clash"]
    with pytest.raises(ConfigError, match="different documents of the name 'one'"):
        filled([words, clash], None, together=True)
    rows[0]["name"] = question["evidence"][0]["document"] = "four"
    fourth = write_set(tmp_path / "fourth", [question], rows)
    (memory,) = filled([words, fourth], [250], others, together=True)
    assert {one.name for one in memory.documents} == {*NAMES, "four", "distractor x.txt"}
    assert len(memory.questions) == 8


def test_sizes_have_names():
    assert [size_name(size) for size in (500, 64_000, 65_536, 999_600, 2_500_000)] == [
        "0.5k",
        "64k",
        "65.5k",
        "1M",
        "2.5M",
    ]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([("a", 3, 9)], True),
        ([("a", 2, 5), ("a", 5, 12)], True),
        ([("a", 5, 12), ("a", 2, 5)], True),
        ([("a", 2, 5), ("a", 6, 12)], False),
        ([("a", 4, 12)], False),
        ([("b", 0, 99)], False),
        ([], False),
    ],
)
def test_spans_cover_another_together(spans, expected):
    assert covers([Span(*span) for span in spans], Span("a", 3, 9)) == expected


@pytest.mark.parametrize("name", sorted(path.name for path in SETS.glob("*/")))
def test_the_sets_that_ship_can_be_read(name):
    assert read_set(name).questions
