"""Numbers and indexes in words, and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def print_json(value: Any) -> None:
    """Print one object on one line."""
    print(json.dumps(value, ensure_ascii=False))


def bytes_used(folder: Path) -> int:
    """Return what a folder's files take on the disk, in bytes; holes in them take nothing."""
    used = 0
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process writes
            continue
        if path.is_file():
            used += status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
    return used


def count(number: int, noun: str) -> str:
    """Return "1 row" or "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Return "999 B", "1.0 kB" and so on."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def index_in_words(index: dict[str, Any]) -> str:
    """Describe an index: its factory, and what it was measured to find."""
    if not index:
        return "none yet"
    words = f"{index['factory']} over {count(index['num_rows'], 'row')}"
    if "recall" in index:
        words += (
            f", finds {index['recall']:.1%} of the nearest 10 rows, which get "
            f"{index['attention']:.1%} of their attention, in {index['scanned']:.1%} of the rows"
        )
    return words
