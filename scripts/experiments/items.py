"""One question about one document whose facts were changed: the item of the retrieval experiment.

The document says something that is not true in the world, so a right answer must come from the
document and not from what the model knows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emt.errors import ConfigError, DocumentError
from emt.ingest.documents import is_utf8
from experiments.tables import read_rows

FIELDS = ("id", "title", "split", "context", "question", "answer", "original_answer")
_SHOWN = 5  # bad rows that one error names


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
        original_answer: what is true in the world; None if unknown, which leaves out `preference`.
        extra: the row's other fields.
    """

    id: str
    title: str
    split: str
    context: str
    question: str
    answer: str
    original_answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def occurrences(self) -> int:
        """How often the document has the answer, whatever its case; at least 1.

        As whole words; where it never stands as one, as in scripts without spaces, anywhere.
        """
        answer = re.escape(self.answer)
        for pattern in (rf"(?<!\w){answer}(?!\w)", answer):
            found = len(re.findall(pattern, self.context, flags=re.IGNORECASE))
            if found:
                return found
        return 1

    def to_row(self) -> dict[str, Any]:
        """Return the item as plain JSON types, other fields last."""
        return {**{name: getattr(self, name) for name in FIELDS}, **self.extra}


def load_items(path: Path | str) -> list[Item]:
    """Read a file of JSON lines, in which empty ones are skipped, plain or in .gz; or .parquet.

    Raises:
        ConfigError: a Parquet file, and pyarrow is not installed.
        DocumentError: it cannot be read, has no items, or bad rows: line and field of each.
    """
    if Path(path).name.lower().endswith((".parquet", ".gz")):
        return to_items(((row.origin, row) for row in read_rows(path)), source=str(path))
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"items '{path}' cannot be read: {reason}") from error
    rows = ((f"line {at}", line) for at, line in enumerate(lines, start=1) if line.strip())
    return to_items(((where, _parsed(line)) for where, line in rows), source=str(path))


def to_items(rows: Iterable[tuple[str, Any]], *, source: str) -> list[Item]:
    """Check rows and make items of them.

    Args:
        rows: (where, row) pairs; `where` is how an error names the row. White space around an
            answer does not count, as a model's answer has none.
        source: where they are from, for errors.

    Raises:
        DocumentError: there are none, or bad ones, each named with what is wrong.
    """
    items: dict[str, Item] = {}
    faults: list[str] = []
    for where, row in rows:
        fault = fault_of(row)
        if fault is None and row["id"] in items:
            fault = f"id '{row['id']}' is there already"
        if fault is not None:
            faults.append(f"{where}: {fault}")
            continue
        extra = {key: value for key, value in row.items() if key not in FIELDS}
        items[row["id"]] = Item(**{name: _kept(name, row[name]) for name in FIELDS}, extra=extra)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DocumentError(
            f"{len(faults)} bad {'row' if len(faults) == 1 else 'rows'} in '{source}'. "
            f"{'; '.join(faults[:_SHOWN])}{more}. Correct them or leave them out."
        )
    if not items:
        raise DocumentError(f"'{source}' has no items. Each must be an object with {_names()}.")
    return list(items.values())


def chosen(items: Iterable[Item], splits: Sequence[str] | None, limit: int | None) -> list[Item]:
    """Return the first items of each split.

    Args:
        items: to choose from.
        splits: which to take; None for all.
        limit: how many of each at most; None for all.

    Raises:
        ConfigError: a split has no items.
    """
    every = list(items)
    known = list(dict.fromkeys(item.split for item in every))
    for split in splits or ():
        if split not in known:
            raise ConfigError(f"no items of split '{split}'. The splits are {', '.join(known)}.")
    taken: Counter[str] = Counter()
    found = []
    for item in every:
        taken[item.split] += 1
        within = limit is None or taken[item.split] <= limit
        if within and (not splits or item.split in splits):
            found.append(item)
    return found


def fault_of(row: Any) -> str | None:
    """Say what is wrong with a row, naming the field; None if it is an item."""
    if isinstance(row, ValueError):
        return f"not JSON: {row}"
    if not isinstance(row, Mapping):
        return f"expected an object with {_names()}; got a {type(row).__name__}"
    for name in FIELDS:
        if name not in row:
            return f"no field '{name}'"
        value = row[name]
        if name == "original_answer" and value is None:
            continue
        if not isinstance(value, str) or not value.strip() or not is_utf8(value):
            return f"'{name}' must be text; got {_short(value)}"
    answer, original = _kept("answer", row["answer"]), _kept("answer", row["original_answer"])
    if answer.lower() not in row["context"].lower():
        return f"'answer' {_short(answer)} is not in its context"
    if original is not None and answer.lower() == original.lower():
        return f"'answer' and 'original_answer' are both {_short(answer)}"
    return None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("too deep")


def _kept(name: str, value: Any) -> Any:
    return value.strip() if name.endswith("answer") and isinstance(value, str) else value


def _names() -> str:
    return ", ".join(FIELDS)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
