"""One question about one document whose facts were changed: the item of the retrieval experiment.

The document says something that is not true in the world, so a right answer must come from the
document and not from what the model learned.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emt.errors import ConfigError, DocumentError
from experiments.rows import Row, read_rows

FIELDS = ("id", "title", "split", "context", "question", "answer", "original_answer")


@dataclass(frozen=True)
class Item:
    """A question about a changed document.

    Attributes:
        id: unique in a file.
        title: of the article that was changed; items of one title may change it differently.
        split: what results are grouped by, such as "2k" for its length.
        context: the document.
        question: what is asked.
        answer: what the document says.
        original_answer: what is true in the world; None if unknown.
    """

    id: str
    title: str
    split: str
    context: str
    question: str
    answer: str
    original_answer: str | None = None

    @property
    def occurrences(self) -> int:
        """How often the document has the answer, whatever its case; at least 1.

        As whole words; where it never stands as one, as in scripts without spaces, anywhere.
        """
        answer = re.escape(self.answer)
        counts = (
            len(re.findall(pattern, self.context, flags=re.IGNORECASE))
            for pattern in (rf"(?<!\w){answer}(?!\w)", answer)
        )
        return next(filter(None, counts), 1)

    @property
    def candidates(self) -> list[str]:
        """The answers whose log-probability is asked for: the answer, and the original if known."""
        return (
            [self.answer] if self.original_answer is None else [self.answer, self.original_answer]
        )


def says(text: str, answer: str) -> bool:
    """Tell whether an answer is in a text, whatever their case.

    Source:
        Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), of 30 greedy tokens.
    """
    return answer.lower() in text.lower()


def load_items(path: Path | str) -> list[Item]:
    """Read the items of a `.jsonl`, `.jsonl.gz` or `.parquet` file; other fields are ignored.

    Raises:
        ConfigError: a file of another kind.
        DocumentError: it cannot be read, has no items, or a bad row, which is named.
    """
    items: dict[str, Item] = {}
    for row in read_rows(path, required=FIELDS):
        item = _item(row)
        if item.id in items:
            raise DocumentError(f"{row.origin}: id '{item.id}' comes twice.")
        items[item.id] = item
    return list(items.values())


def _item(row: Row) -> Item:
    texts = {name: row.text(name) for name in FIELDS[:-1]}
    texts["answer"] = texts["answer"].strip()  # a model's answer has no white space around it
    original = row["original_answer"] and row.text("original_answer").strip()
    item = Item(**texts, original_answer=original)
    if not says(item.context, item.answer):
        raise DocumentError(f"{row.origin}: 'answer' {item.answer!r:.60} is not in its context.")
    if original and item.answer.lower() == original.lower():
        raise DocumentError(
            f"{row.origin}: 'answer' and 'original_answer' are both {original!r:.60}."
        )
    return item


def chosen(items: Iterable[Item], splits: Sequence[str] | None, limit: int | None) -> list[Item]:
    """Return the first items of each split.

    Args:
        items: to choose from.
        splits: the splits to take; None for all.
        limit: items of each at most; None for all.

    Raises:
        ConfigError: a split has no items.
    """
    every = list(items)
    names = list(dict.fromkeys(item.split for item in every))
    for split in splits or ():
        if split not in names:
            raise ConfigError(f"no items of split '{split}'. The splits are {', '.join(names)}.")
    taken: Counter[str] = Counter()
    kept = []
    for item in every:
        taken[item.split] += 1
        within = limit is None or taken[item.split] <= limit
        if within and (not splits or item.split in splits):
            kept.append(item)
    return kept
