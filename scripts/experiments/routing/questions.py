"""The questions of the routing experiment, and the place of each answer in the stored text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emt.errors import ConfigError
from emt.passage import Passage
from emt.profiles.examples import Example
from memory_backends import StoredDocument

_AROUND = 40  # characters on both sides of an answer, by which its place is recognised


@dataclass(frozen=True)
class StoredAnswer:
    """Rows of a stored document that answer a question.

    Attributes:
        document: its name.
        first: row of the document at which the answer begins.
        stop: one after its last row.
    """

    document: str
    first: int
    stop: int

    def is_in(self, passage: Passage) -> bool:
        """Tell whether a passage has the whole answer."""
        is_same = passage.document == self.document
        return is_same and passage.first <= self.first and self.stop <= passage.stop


@dataclass(frozen=True)
class RoutedQuestion:
    """A question, and its answer if it is about the store.

    Attributes:
        question: what is asked.
        answer: None if nothing in the store is about it.
    """

    question: str
    answer: StoredAnswer | None = None

    @property
    def key(self) -> str:
        """What tells it from others in a results file."""
        if self.answer is None:
            return f"unrelated/{digest(self.question)}"
        return f"{self.answer.document}/{self.answer.first}/{digest(self.question)}"

    def judged(self, passages: Sequence[Passage]) -> dict[str, bool | None]:
        """Tell what of the answer is in some passages, best first; None without an answer.

        Returns:
            `document`, whether the first passage is of the right document; `first` and `any`,
            whether the first or any passage has the answer.
        """
        if self.answer is None:
            return dict.fromkeys(("document", "first", "any"))
        right = [self.answer.is_in(passage) for passage in passages]
        return {
            "document": bool(passages) and passages[0].document == self.answer.document,
            "first": right[:1] == [True],
            "any": any(right),
        }


def stored_questions(
    examples: Collection[Example], documents: Collection[StoredDocument], limit: int | None
) -> list[RoutedQuestion]:
    """Return the questions that are about stored documents, each once.

    Args:
        examples: questions with the text that answers them.
        documents: those of the store that were written as text.
        limit: questions of each document at most; None for all.
    """
    counts: dict[str, int] = {}
    questions: dict[RoutedQuestion, None] = {}
    for example in examples:
        low = max(example.start - _AROUND, 0)
        around = example.document[low : example.end + _AROUND]
        document = next((one for one in documents if around in (one.text or "")), None)
        if document is None:
            continue
        counts[document.name] = counts.get(document.name, 0) + 1
        if limit is None or counts[document.name] <= limit:
            start = str(document.text).find(around) + example.start - low
            rows = _rows_of(document, start, start + example.end - example.start)
            questions[RoutedQuestion(example.question, StoredAnswer(document.name, *rows))] = None
    return list(questions)


def unrelated_questions(path: str | None) -> list[RoutedQuestion]:
    """Read prompts about nothing in the store, one a line; none of None.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"unrelated prompts '{path}' cannot be read: {error}") from error
    lines = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    return [RoutedQuestion(line) for line in lines]


def digest_of(questions: Sequence[RoutedQuestion]) -> str:
    """Return a digest of questions and answers, for a results file's header."""
    return digest([dataclasses.astuple(question) for question in questions])


def digest(value: Any) -> str:
    """Return 12 hex digits of the SHA-256 of plain types."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _rows_of(document: StoredDocument, start: int, end: int) -> tuple[int, int]:
    """Return the first row of some characters of a document, and one after their last."""
    if document.offsets is None:
        raise ValueError(f"document '{document.name}' was not written as text.")
    spans = document.offsets[document.row_tokens]
    rows = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < end))
    return int(rows[0]), int(rows[-1]) + 1
