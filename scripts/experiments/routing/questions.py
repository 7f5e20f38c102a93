"""The questions of the routing experiment, and the place of each answer in the stored text."""

from __future__ import annotations

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
class RoutedQuestion:
    """A question, and the rows that answer it if it is about the store.

    Attributes:
        question: what is asked.
        answer: passage of the rows that the answer covers; None if nothing in the store has it.
    """

    question: str
    answer: Passage | None = None

    @property
    def key(self) -> str:
        """What tells it from others in a results file."""
        about = f"{self.answer.document}/{self.answer.first}" if self.answer else "unrelated"
        return f"{about}/{digest(self.question)}"

    def judged(self, passages: Sequence[Passage]) -> dict[str, bool | None]:
        """Tell what of the answer is in some passages, best first; None without an answer.

        Returns:
            `document`, whether the first passage is of the right document; `first` and `any`,
            whether the first or any passage has the whole answer.
        """
        answer = self.answer
        if answer is None:
            return dict.fromkeys(("document", "first", "any"))
        right = [
            passage.document == answer.document
            and passage.first <= answer.first
            and answer.stop <= passage.stop
            for passage in passages
        ]
        return {
            "document": bool(passages) and passages[0].document == answer.document,
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
        if document is None or document.offsets is None:
            continue
        counts[document.name] = counts.get(document.name, 0) + 1
        if limit is None or counts[document.name] <= limit:
            start = str(document.text).find(around) + example.start - low
            end = start + example.end - example.start
            spans = document.offsets[document.row_tokens]
            rows = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < end)).tolist()
            answer = Passage(document.name, rows[0], rows[-1] + 1)
            questions[RoutedQuestion(example.question, answer)] = None
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


def digest(value: Any) -> str:
    """Return 12 hex digits of the SHA-256 of plain types."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
