"""Articles with questions and answers: SQuAD's JSON layout, or rows of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emt.errors import DocumentError
from experiments.tables import Row, Source, read_rows


@dataclass(frozen=True)
class Question:
    """A question that its article answers.

    Attributes:
        id: of the question in its data set.
        text: as it was asked.
        answers: (answer, its first character in the article), one for each annotator.
    """

    id: str
    text: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Article:
    """A whole article.

    Attributes:
        title: "" if it has none.
        text: the title, and the paragraphs after blank lines.
        questions: about it.
    """

    title: str
    text: str
    questions: tuple[Question, ...]


def read_articles(source: Source, columns: Mapping[str, str] | None = None) -> list[Article]:
    """Read articles.

    Args:
        source: a `.json` file in the layout of SQuAD, or anything that `read_rows` reads. Rows have
            `context`, `question` and `answer` (or `answers`), text, a list of texts, or SQuAD's
            {"text": [...], "answer_start": [...]}. Rows with one `title` are one article whose
            paragraphs are their contexts; without a title each context is an article.
        columns: our name of a column -> the data set's.

    Raises:
        ConfigError: a file of a kind that is not read.
        DocumentError: it cannot be read, a row lacks a field, an answer is not in its context, or
            there is no question at all; with file and row.
    """
    if isinstance(source, str | Path) and str(source).lower().endswith(".json"):
        articles = list(_squad(Path(source)))
    else:
        articles = _of_rows(read_rows(source, required=("context", "question"), columns=columns))
    if not any(article.questions for article in articles):
        raise DocumentError(f"no question in {_name(source)}; expected articles with questions.")
    return articles


class _Pages:
    """An article that grows by paragraphs."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.text = title
        self.starts: dict[str, int] = {}
        self.questions: list[Question] = []

    def start_of(self, paragraph: str) -> int:
        """Return where a paragraph stands; it is added if it is new."""
        if paragraph not in self.starts:
            self.text += "\n\n" if self.text else ""
            self.starts[paragraph] = len(self.text)
            self.text += paragraph
        return self.starts[paragraph]

    def ask(
        self,
        id: str,
        text: str,
        answers: Sequence[tuple[str, int | None]],
        context: str,
        where: str,
    ) -> None:
        """Add a question about a paragraph."""
        found = []
        for answer, start in answers:
            at = context.find(answer) if start is None else start
            if at < 0 or not answer or context[at : at + len(answer)] != answer:
                place = "" if start is None else f" at character {start}"
                raise DocumentError(
                    f"{where}: answer {answer[:60]!r} is not in its context{place}. "
                    "Correct the answer, or leave the row out."
                )
            found.append((answer, self.start_of(context) + at))
        self.start_of(context)
        self.questions.append(Question(id, text, tuple(found)))

    def article(self) -> Article:
        """Return it."""
        return Article(self.title, self.text, tuple(self.questions))


def _squad(path: Path) -> Iterator[Article]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DocumentError(f"'{path}' cannot be read as JSON: {error}") from error
    where = f"'{path}'"
    try:
        for number, entry in enumerate(found["data"], start=1):
            where = f"'{path}' article {number}"
            pages = _Pages(entry.get("title", "").replace("_", " "))
            for index, paragraph in enumerate(entry["paragraphs"], start=1):
                where = f"'{path}' article {number} paragraph {index}"
                context = paragraph["context"]
                pages.start_of(context)
                for qa in paragraph["qas"]:
                    where = f"'{path}' question '{qa['id']}'"
                    answers = [(one["text"], one.get("answer_start")) for one in qa["answers"]]
                    pages.ask(str(qa["id"]), qa["question"], answers, context, where)
            yield pages.article()
    except (KeyError, TypeError, AttributeError) as error:
        what = f"has no field {error}" if isinstance(error, KeyError) else f"has a fault: {error}"
        raise DocumentError(
            f"{where} {what}. Expected SQuAD's layout: data, paragraphs, context, qas, answers."
        ) from error


def _of_rows(rows: Iterator[Row]) -> list[Article]:
    found: dict[str, _Pages] = {}
    for number, row in enumerate(rows, start=1):
        context, title = row.text("context"), row.get("title") or ""
        pages = found.setdefault(str(title or context), _Pages(str(title).replace("_", " ")))
        id = str(row.get("id") or f"row-{number}")
        pages.ask(id, row.text("question"), _answers(row), context, row.origin)
    return [pages.article() for pages in found.values()]


def _answers(row: Row) -> list[tuple[str, int | None]]:
    """Return (answer, start in the context or None) of one row."""
    value: Any = row.get("answers", row.get("answer"))
    starts: Any = None
    if isinstance(value, Mapping):
        value, starts = value.get("text"), value.get("answer_start")
    if isinstance(value, str):
        value, starts = [value], [row.get("answer_start")]
    texts = list(value) if isinstance(value, Sequence) else []
    if value is None or not all(isinstance(text, str) and text for text in texts):
        raise DocumentError(
            f"{row.origin}: field 'answer' must be text or a list of texts; got {value!r:.60}. "
            "Name its column with columns: {answer: theirs}."
        )
    starts = list(starts) if starts is not None else [None] * len(texts)
    if len(starts) != len(texts):
        raise DocumentError(
            f"{row.origin}: {len(texts)} answers have {len(starts)} values of answer_start."
        )
    return list(zip(texts, starts, strict=True))


def _name(source: Source) -> str:
    return f"'{source}'" if isinstance(source, str | Path) else "the data set"
