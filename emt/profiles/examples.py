"""Questions about texts, with the places of their answers: from a file, or made from any text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emt.errors import ConfigError

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]")
_NAME = re.compile(r"(?<![.!?]\s)(?<=\s)[A-Z][\w'-]{3,}(?:\s[A-Z][\w'-]+)*|\b\d{2,}\b")
_CONTENT = re.compile(r"\w{4,}")


@dataclass(frozen=True)
class Example:
    """A question about a text, whose answer is `document[start:end]`."""

    document: str
    question: str
    start: int
    end: int


def read_examples(path: Path | str) -> list[Example]:
    """Read questions with their texts.

    Args:
        path: a .json file in SQuAD's layout, or a .jsonl file of objects with `context`,
            `question` and `answer`.

    Raises:
        ConfigError: the file cannot be read, or has no question whose answer is in its text.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            examples = list(_of_lines(lines))
        else:
            examples = list(_of_articles(json.loads(text)))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"questions '{path}' cannot be read: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"questions '{path}': expected SQuAD's layout in .json, or objects with context, "
            f"question and answer in .jsonl; got something else ({type(error).__name__}: {error})."
        ) from error
    if not examples:
        raise ConfigError(f"questions '{path}' has none whose answer stands in its text.")
    return examples


def _of_lines(rows: Iterable[Any]) -> Iterator[Example]:
    for row in rows:
        start = row["context"].find(row["answer"])
        if start >= 0:
            yield Example(row["context"], row["question"], start, start + len(row["answer"]))


def _of_articles(data: Any) -> Iterator[Example]:
    """Yield the questions of articles, each article one text."""
    for article in data["data"] if isinstance(data, dict) else data:
        text, questions = str(article.get("title", "")).replace("_", " "), []
        for paragraph in article["paragraphs"]:
            before = len(text) + 2
            text += "\n\n" + paragraph["context"]
            for entry in paragraph["qas"]:
                if entry.get("answers"):
                    answer = entry["answers"][0]
                    start = before + int(answer["answer_start"])
                    end = start + len(answer["text"])
                    questions.append((entry["question"].strip(), start, end))
        for question, start, end in questions:
            yield Example(text, question, start, end)


def make_examples(texts: Iterable[str]) -> list[Example]:
    """Make questions from texts: sentences with a rare name or number left out.

    A question has the words of four letters and more that are left, and so the sentence's subject
    and not its wording.
    """
    return [example for text in texts for example in _of_sentences(text)]


def _of_sentences(text: str) -> Iterator[Example]:
    counts = Counter(word.lower() for word in _CONTENT.findall(text))
    for match in _SENTENCE.finditer(text):
        sentence = match.group()
        names = _NAME.finditer(sentence)
        rare = [name for name in names if counts[name.group().split()[0].lower()] <= 2]
        if not rare:
            continue
        answer = rare[-1]
        words = _CONTENT.findall(sentence[: answer.start()] + " " + sentence[answer.end() :])
        if not 4 <= len(words) <= 24:
            continue
        kind = "number" if answer.group().isdigit() else "name"
        question = f"Which {kind} is it: {' '.join(words)}?"
        start = match.start() + answer.start()
        yield Example(text, question, start, start + len(answer.group()))
