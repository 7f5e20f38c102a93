"""Articles with questions and answers: SQuAD's JSON layout, or rows of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emt.errors import DocumentError
from experiments.rows import Row, read_rows


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


@dataclass
class Article:
    """A whole article.

    Attributes:
        title: "" if it has none.
        text: the title, and the paragraphs after blank lines.
        questions: about it.
    """

    title: str
    text: str
    questions: list[Question] = field(default_factory=list)

    def start_of(self, paragraph: str) -> int:
        """Return the first character of a paragraph, which is added if it is new."""
        separated = f"\n\n{self.text}\n\n"
        start = separated.find(f"\n\n{paragraph}\n\n")
        if start < 0:
            self.text += f"\n\n{paragraph}" if self.text else paragraph
            start = len(self.text) - len(paragraph)
        return start

    def ask(self, origin: str, id: str, text: str, context: str, answers: Any) -> None:
        """Add a question about a paragraph.

        Args:
            origin: of the question, for errors.
            id: of the question.
            text: what is asked.
            context: the paragraph.
            answers: (answer, its first character in the paragraph or None) pairs.

        Raises:
            DocumentError: an answer is not in the paragraph.
        """
        paragraph, places = self.start_of(context), []
        for answer, given in answers:
            start = context.find(answer) if given is None else given
            if start < 0 or not answer or not context.startswith(answer, start):
                raise DocumentError(f"{origin}: answer {answer!r:.60} is not in its context.")
            places.append((answer, paragraph + start))
        self.questions.append(Question(id, text, tuple(places)))


def read_articles(path: Path | str) -> list[Article]:
    """Read articles.

    Args:
        path: a `.json` file in the layout of SQuAD, or one that `read_rows` reads, with `context`,
            `question` and `answer` (text), or `answers` as SQuAD's rows have them: {"text": [...],
            "answer_start": [...]}. Rows with one `title` are one article whose paragraphs are their
            contexts; without a title each context is an article.

    Raises:
        ConfigError: a file of a kind that is not read.
        DocumentError: it cannot be read, a row lacks a field, an answer is not in its context, or
            there is no question at all; with file and row.
    """
    is_squad = str(path).lower().endswith(".json")
    articles = list(_squad(Path(path)) if is_squad else _of_rows(path))
    if not any(article.questions for article in articles):
        raise DocumentError(f"no question in '{path}'; expected articles with questions.")
    return articles


def _squad(path: Path) -> Iterator[Article]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DocumentError(f"'{path}' cannot be read as JSON: {error}") from error
    try:
        for entry in data["data"]:
            title = entry.get("title", "").replace("_", " ")
            article = Article(title, title)
            for paragraph in entry["paragraphs"]:
                article.start_of(paragraph["context"])
                for asked in paragraph["qas"]:
                    origin = f"'{path}' question '{asked['id']}'"
                    answers = [(one["text"], one.get("answer_start")) for one in asked["answers"]]
                    context = paragraph["context"]
                    article.ask(origin, str(asked["id"]), asked["question"], context, answers)
            yield article
    except (KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"'{path}' is not in SQuAD's layout of articles, paragraphs and questions: {error!r}."
        ) from error


def _of_rows(path: Path | str) -> list[Article]:
    articles: dict[str, Article] = {}
    for number, row in enumerate(read_rows(path, required=("context", "question")), start=1):
        context = row.text("context")
        title = str(row.get("title") or "").replace("_", " ")
        article = articles.setdefault(title or context, Article(title, title))
        id = str(row.get("id") or f"row-{number}")
        article.ask(row.origin, id, row.text("question"), context, _answers(row))
    return list(articles.values())


def _answers(row: Row) -> Sequence[tuple[str, int | None]]:
    """Return (answer, start in the context or None) of one row."""
    answers = row.get("answers")
    if isinstance(answers, Mapping):
        return list(zip(answers["text"], answers["answer_start"], strict=True))
    return [(row.text("answer"), row.get("answer_start"))]
