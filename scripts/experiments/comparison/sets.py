"""Question sets: documents, questions about them, and where their answers stand.

A set is a folder with `about.yaml`, `questions.jsonl` and, unless it asks about another set's
documents, `documents.jsonl`; configs/experiments/data/questions/README.md has the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from emt.errors import ConfigError, DocumentError
from experiments.rows import Row, read_rows
from experiments.spans import Span
from memory_backends.catalog.metadata import check_where
from memory_backends.layout import MetadataValue

SETS = Path(__file__).parents[3] / "configs" / "experiments" / "data" / "questions"


class Text(NamedTuple):
    """A document, as `Memory.write_all` takes it."""

    name: str
    text: str
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Question:
    """A question of a set.

    Attributes:
        set: the set's name.
        id: unique in the set.
        question: what is asked.
        answers: any of them is right; none if nothing in the documents answers.
        evidence: the places that are needed to answer, each of them.
        where: the condition on documents' metadata that belongs to the question: key -> values of
            which any will do.
        original: what is true in the world, where the documents say otherwise.
        kind: a finer kind.
    """

    set: str
    id: str
    question: str
    answers: tuple[str, ...]
    evidence: tuple[Span, ...]
    where: Mapping[str, list[MetadataValue]] | None = None
    original: str | None = None
    kind: str | None = None

    @property
    def candidates(self) -> list[str]:
        """The answers whose log-probability is asked for: the first, and the original if known."""
        return [*self.answers[:1], *([self.original] if self.original else [])]

    @property
    def documents(self) -> list[str]:
        """The documents that have the evidence."""
        return list(dict.fromkeys(span.document for span in self.evidence))


@dataclass(frozen=True)
class QuestionSet:
    """A set that was read.

    Attributes:
        name: of its folder.
        documents_of: name of the set whose documents these are; its own mostly.
        documents: by name.
        questions: in an order drawn by their ids, so that the first few are about all of it.
    """

    name: str
    documents_of: str
    documents: dict[str, Text]
    questions: list[Question]


def read_set(folder: Path | str) -> QuestionSet:
    """Read a set.

    Args:
        folder: its folder, or the name of one that comes with the repository.

    Raises:
        ConfigError: there is no such set, or its `about.yaml` is wrong.
        DocumentError: a row is wrong, which is named.
    """
    folder = _folder_of(folder)
    about = _about(folder)
    own = folder if about.get("documents_of") is None else _other(folder, about["documents_of"])
    documents = _documents(own / "documents.jsonl")
    questions: dict[str, Question] = {}
    for row in read_rows(folder / "questions.jsonl", ["id", "question", "answers", "evidence"]):
        question = _question(row, folder.name, documents)
        if question.id in questions:
            raise DocumentError(f"{row.origin}: id '{question.id}' comes twice.")
        questions[question.id] = question
    drawn = sorted(questions.values(), key=lambda one: hashlib.sha256(one.id.encode()).digest())
    return QuestionSet(folder.name, own.name, documents, drawn)


def _folder_of(given: Path | str) -> Path:
    named = SETS / given
    folder = named if named.is_dir() else Path(given)
    if not (folder / "questions.jsonl").is_file():
        names = ", ".join(sorted(path.name for path in SETS.glob("*/"))) or "none"
        raise ConfigError(
            f"expected a folder with a questions.jsonl, or a set of '{SETS}' ({names}); "
            f"got '{given}'."
        )
    return folder.resolve()


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "about.yaml"
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(about, dict) or not all(about.get(key) for key in ("what", "source")):
        raise ConfigError(f"'{path}' must say what the set is, and its source and licence.")
    return about


def _other(folder: Path, name: Any) -> Path:
    other = folder.parent / str(name)
    return other if (other / "documents.jsonl").is_file() else _folder_of(str(name))


def _documents(path: Path) -> dict[str, Text]:
    documents: dict[str, Text] = {}
    for row in read_rows(path, ["name", "text"]):
        name, metadata = row.text("name"), row.get("metadata")
        if name in documents:
            raise DocumentError(f"{row.origin}: a document '{name}' comes twice.")
        if not isinstance(metadata, Mapping | None):
            raise DocumentError(f"{row.origin}: 'metadata' must be an object; got {metadata!r:.60}")
        documents[name] = Text(name, row.text("text"), metadata)
    return documents


def _question(row: Row, name: str, documents: Mapping[str, Text]) -> Question:
    answers, evidence = row["answers"], row["evidence"]
    if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise DocumentError(f"{row.origin}: 'answers' must be a list of texts; got {answers!r:.60}")
    if not isinstance(evidence, list) or not all(isinstance(one, Mapping) for one in evidence):
        raise DocumentError(
            f"{row.origin}: 'evidence' must be a list of objects; got {evidence!r:.60}"
        )
    if bool(answers) != bool(evidence):
        raise DocumentError(f"{row.origin}: has answers without evidence, or the other way round.")
    question = Question(
        set=name,
        id=row.text("id"),
        question=row.text("question"),
        answers=tuple(answer.strip() for answer in answers),
        evidence=tuple(_span(Row(one, row.origin), documents) for one in evidence),
        where=None if row.get("where") is None else _where(row),
        original=row.text("original").strip() if row.get("original") is not None else None,
        kind=row.text("kind") if row.get("kind") is not None else None,
    )
    if question.original is not None and question.original in question.answers:
        raise DocumentError(f"{row.origin}: 'original' {question.original!r:.60} is an answer.")
    return question


def _where(row: Row) -> dict[str, list[MetadataValue]]:
    try:
        return check_where(row["where"])
    except DocumentError as error:
        raise DocumentError(f"{row.origin}: {error}") from error


def _span(evidence: Row, documents: Mapping[str, Text]) -> Span:
    """Find a piece of evidence in its document, where it must stand once."""
    name, text = evidence.text("document"), evidence.text("text").strip()
    if name not in documents:
        raise DocumentError(f"{evidence.origin}: there is no document '{name}'.")
    count = documents[name].text.count(text)
    if count != 1:
        raise DocumentError(
            f"{evidence.origin}: evidence must stand once in document '{name}'; "
            f"{text!r:.60} stands there {count} times."
        )
    start = documents[name].text.index(text)
    return Span(name, start, start + len(text))
