"""Questions about texts, with the places of their answers: from a file, or made from any text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from emt.citations.sentences import sentence_spans
from emt.errors import ConfigError

# What stands for words in scripts without spaces: two characters of Chinese or Japanese, three of
# those that Unicode breaks by dictionary (Thai, Lao, Khmer, Burmese).
_RUN = r"[\p{Han}\p{Katakana}\u30fc]{2}|(?:(?=\p{Line_Break=Complex_Context})\X){3}"
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Line_Break=Complex_Context}]"
_CASELESS = rf"[[\p{{Lo}}\p{{M}}\p{{Join_Control}}]--{_UNSPACED}]{{2,}}"  # no script with capitals
_CONTENT = regex.compile(
    rf"(?V1){_RUN}|\p{{Hiragana}}{{2}}|{_CASELESS}|[\w\p{{M}}--{_UNSPACED}]{{4,}}"
)
_NUMBER = r"(?<![\p{Cased_Letter}\d])\d{2,}(?![\p{Cased_Letter}\d])"
_NAME_PART = r"[\w\p{M}'\u2019-]"
_NAME = rf"(?<=\s)\p{{Lu}}{_NAME_PART}{{3,}}(?:\s\p{{Lu}}{_NAME_PART}+)*"  # not the first word
_ANSWER = regex.compile(rf"(?V1)(?P<number>{_NUMBER})|(?P<name>{_NAME})|{_RUN}|{_CASELESS}")
_WORDS_ON_A_SIDE = 12


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
    """Make questions from texts of any script: sentences with a rare word or number left out.

    What is left out is a name, where capitals tell names, or a long word. A question has words that
    stand near it, short ones of alphabets with capitals left out: the sentence's subject, and not
    its wording.
    """
    return [example for text in texts for example in _of_sentences(text)]


def _of_sentences(text: str) -> Iterator[Example]:
    counts = Counter(word.lower() for word in _CONTENT.findall(text))

    def rank(match: Any) -> tuple[int, int, int]:
        return -_count(match, counts), len(match.group()), match.start()

    for first, stop in sentence_spans(text):
        sentence = text[first:stop]
        rare = [match for match in _ANSWER.finditer(sentence) if _count(match, counts) <= 2]
        if not rare:
            continue
        named = [match for match in rare if match.lastgroup]
        answer = named[-1] if named else max(rare, key=rank)
        words = _CONTENT.findall(sentence[: answer.start()])[-_WORDS_ON_A_SIDE:]
        words += _CONTENT.findall(sentence[answer.end() :])[:_WORDS_ON_A_SIDE]
        if len(words) < 4 or answer.group() in words:
            continue
        question = f"Which {answer.lastgroup or 'word'} is it: {' '.join(words)}?"
        yield Example(text, question, first + answer.start(), first + answer.end())


def _count(match: Any, counts: Mapping[str, int]) -> int:
    """Return how often the first word of a possible answer stands in the text."""
    return counts[match.group().split()[0].lower()]
