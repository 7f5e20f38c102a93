"""Every question set that is shipped: what it says about its documents is so."""

import functools
import json
import re
from pathlib import Path

import pytest
import yaml

from memory_backends.catalog.metadata import check_where, is_value, matches
from tests.emt.commands import ROOT

SETS = ROOT / "configs" / "experiments" / "data" / "questions"
NAMES = sorted(folder.name for folder in SETS.iterdir() if folder.is_dir())
ABOUT = {"what", "source", "licence"}
FIELDS = {"id", "question", "answers", "evidence"}
OPTIONAL = {"where", "original", "kind"}

every_set = pytest.mark.parametrize("name", NAMES)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@functools.cache
def about(name: str) -> dict:
    return yaml.safe_load((SETS / name / "about.yaml").read_text(encoding="utf-8"))


@functools.cache
def documents(name: str) -> dict[str, dict]:
    """Return the documents of a set by name: its own, or those of the set that it names."""
    listed = rows(SETS / about(name).get("documents_of", name) / "documents.jsonl")
    return {document["name"]: document for document in listed}


@functools.cache
def questions(name: str) -> list[dict]:
    return rows(SETS / name / "questions.jsonl")


@every_set
def test_a_set_says_what_it_is_and_whose_text_it_has(name):
    said = about(name)
    assert (
        {"what", "source", "licence"} <= set(said) <= {"what", "source", "licence", "documents_of"}
    )
    assert all(isinstance(value, str) and value.strip() for value in said.values())
    has_own = (SETS / name / "documents.jsonl").is_file()
    assert has_own != ("documents_of" in said)
    if not has_own:  # the other set has documents itself
        assert (SETS / said["documents_of"] / "documents.jsonl").is_file()


@every_set
def test_documents_have_a_name_of_their_own_and_text(name):
    listed = rows(SETS / about(name).get("documents_of", name) / "documents.jsonl")
    assert len({document["name"] for document in listed}) == len(listed) > 0
    assert len({document["text"] for document in listed}) == len(listed)
    for document in listed:
        assert {"name", "text"} <= set(document) <= {"name", "text", "metadata"}
        assert document["text"].strip()
        assert all(is_value(value) for value in document.get("metadata", {}).values())


@every_set
def test_questions_are_asked_once_and_have_the_fields_of_the_format(name):
    listed = questions(name)
    assert len({question["id"] for question in listed}) == len(listed) > 0
    # one question may be asked of several versions of a fact, told by their metadata
    keys = {(question["question"], json.dumps(question.get("where"))) for question in listed}
    assert len(keys) == len(listed)
    for question in listed:
        assert FIELDS <= set(question) <= FIELDS | OPTIONAL, question["id"]
        assert question["question"] == question["question"].strip() != ""
        answers = question["answers"]
        assert all(answer == answer.strip() != "" for answer in answers), question["id"]
        assert len(set(answers)) == len(answers), question["id"]
        assert bool(answers) == bool(question["evidence"]), question["id"]


@every_set
def test_evidence_occurs_once_in_its_document_and_carries_the_answer(name):
    for question in questions(name):
        evidence = question["evidence"]
        for passage in evidence:
            text = documents(name)[passage["document"]]["text"]
            assert occurrences(text, passage["text"]) == 1, question["id"]
        if not evidence:
            continue
        answer = question["answers"][0].casefold()
        if len(evidence) == 1:
            assert answer in evidence[0]["text"].casefold(), question["id"]
        else:  # made of what several documents say, each part of it literally
            texts = [documents(name)[passage["document"]]["text"] for passage in evidence]
            stated = "\n".join(texts).casefold()
            parts = re.split(r", (?:and )?| and ", answer)
            assert answer in stated or all(part in stated for part in parts), question["id"]


@every_set
def test_an_original_answer_is_not_in_the_document(name):
    for question in questions(name):
        if "original" in question:
            assert question["original"] not in question["answers"], question["id"]
            for passage in question["evidence"]:
                text = documents(name)[passage["document"]]["text"]
                pattern = rf"(?<!\w){re.escape(question['original'])}(?!\w)"
                assert not re.search(pattern, text, flags=re.IGNORECASE), question["id"]


@every_set
def test_a_condition_leaves_the_documents_of_the_evidence(name):
    for question in questions(name):
        where = check_where(question.get("where", {}))
        for passage in question["evidence"]:
            metadata = documents(name)[passage["document"]].get("metadata", {})
            assert matches(metadata, where), question["id"]


def test_questions_in_other_words_share_none_with_the_evidence():
    small = {"after", "since", "those", "where", "which", "while", "whose"}

    def starts(text):  # two forms of one word begin with the same letters
        words = re.findall(r"[^\W\d_]{5,}", text.casefold())
        return {word[:5] for word in words} - small

    for question in questions("paraphrases"):
        (passage,) = question["evidence"]
        assert not starts(question["question"]) & starts(passage["text"]), question["id"]


def occurrences(text: str, passage: str) -> int:
    """Count the places of a passage, those that overlap, too."""
    return len(re.findall(f"(?={re.escape(passage)})", text)) if passage else 0
