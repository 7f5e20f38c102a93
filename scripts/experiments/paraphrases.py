"""Questions asked again in other words, and how many words they still share with the answer.

A search that compares words finds a passage because the question repeats it. Asked in synonyms,
other word forms and descriptions, the same question shows what a search finds by meaning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from emt.errors import DocumentError
from experiments.builder.folding import fold
from experiments.builder.vocabulary import words
from experiments.items import Item

_FIELDS = ("id", "question", "original")
_STEM = 4  # letters that two forms of one word have in common at least
_FUNCTION_WORDS = frozenset(
    words("""
    a about above across after again against all along also although always among an and another
    any are around as at away be because been before behind being below between both but by can
    could did do does done down during each either else ever every few for from had has have he
    her hers him his how however i if in into is it its itself just least less many may me might
    more most much must my neither never no none nor not of off on once one only or other others
    our out over own per s shall she should since so some someone such t than that the their them
    themselves then there therefore these they this those though through thus to together too
    toward towards under until up upon us was we were what when where whether which while who whom
    whose why will with within without would yet you your
    """)
)
# A new line or ".", "!", "?" with what may stand behind it: notes such as [update] or :33, quotes.
# Not after an initial or "St": a sentence too long counts more shared words, one cut too few.
_SENTENCE_END = re.compile(
    r"""(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bSt\.)(?:\[[^\]\n]*\]|:\d+|["'\u201d\u2019)])*\s+|\n+"""
)


def paraphrased(items: Iterable[Item], path: Path | str) -> list[Item]:
    """Return the items that a file asks in other words, with its questions, in their own order.

    Items that the file does not have are left out. Choose among items after this, not before: an
    id that no item has is an error, so that a file for other items is not read as an empty one.

    Args:
        items: with ids of their own.
        path: JSON lines with the "id" of an item, its "question" in other words and the "original".

    Raises:
        DocumentError: the file cannot be read or has no rows, a row is not such an object, an id
            comes twice or no item has it, or its item asks something else than "original".
    """
    rows = _rows(Path(path))
    items = list(items)
    asked = {item.id: item.question for item in items}
    for where, row in rows.values():
        if row["id"] not in asked:
            raise DocumentError(
                f"{where}: expected the id of one of the {len(items)} items; got '{row['id']}'. "
                "Give the items that the file was written for, all of them."
            )
        if row["original"] != asked[row["id"]]:
            raise DocumentError(
                f"{where}: expected the question of item '{row['id']}', "
                f"'{asked[row['id']]}', as 'original'; got '{row['original']}'. "
                "Write the question in other words anew, or give the items it was written for."
            )
    return [
        replace(item, question=rows[item.id][1]["question"]) for item in items if item.id in rows
    ]


def shared_words(item: Item) -> list[str]:
    """Return the content words of an item's question that a sentence with its answer has too.

    Two words count as one if they are equal but for a last "s", or begin with the same 4 letters:
    "sign" and "signed", "Norman" and "Normans", and also, by chance, "state" and "statement". So
    more is found than is there, and an empty list can be trusted. Case, accents and function words
    ("the", "which", "after") do not count.

    Returns:
        As they stand in the question, without case or accents, each once.
    """
    there = {word for sentence in answer_sentences(item) for word in content_words(sentence)}
    return [
        word for word in content_words(item.question) if any(_same(word, other) for other in there)
    ]


def mean_shared_words(items: Sequence[Item]) -> float:
    """Return how many words questions share with the sentences of their answers, on average.

    Raises:
        ValueError: there are no items.
    """
    if not items:
        raise ValueError("a mean needs at least one item; got none.")
    return fmean(len(shared_words(item)) for item in items)


def answer_sentences(item: Item) -> list[str]:
    """Return the sentences of an item's document that hold its answer as whole words."""
    answer = re.compile(rf"(?<!\w){re.escape(item.answer)}(?!\w)", re.IGNORECASE)
    text = item.context
    ends = [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    starts = [0, *ends[:-1]]
    matches = [(match.start(), match.end()) for match in answer.finditer(text)]
    return [
        text[start:end].strip()
        for start, end in zip(starts, ends, strict=True)
        # by overlap, because an answer such as "Mr. Hull" may itself be cut
        if any(first < end and last > start for first, last in matches)
    ]


def content_words(text: str) -> list[str]:
    """Return the words and numbers of a text without function words, case and accents, each once.

    "1,128" is two, as is "north-west".
    """
    found = re.findall(r"[^\W_]+", fold(text))
    return [word for word in dict.fromkeys(found) if word not in _FUNCTION_WORDS]


def _same(one: str, other: str) -> bool:
    if len(one) >= _STEM and len(other) >= _STEM:
        return one[:_STEM] == other[:_STEM]
    return one.removesuffix("s") == other.removesuffix("s")


def _rows(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return by id where a row stands and the row, checked."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"questions '{path}' cannot be read: {reason}.") from error
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"'{path}' line {number}"
        row = _parsed(line, where)
        if row["id"] in rows:
            raise DocumentError(f"{where}: id '{row['id']}' is there already. Leave one out.")
        rows[row["id"]] = (where, row)
    if not rows:
        raise DocumentError(f"'{path}' has no questions. Each must be {_expected()}.")
    return rows


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict) or not all(
        isinstance(row.get(name), str) and row[name].strip() for name in _FIELDS
    ):
        raise DocumentError(f"{where}: expected {_expected()}; got {line.strip()[:60]}.")
    return row


def _expected() -> str:
    return f"an object with {', '.join(_FIELDS)}, each text"
