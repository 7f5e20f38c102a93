"""What is printed: text that a terminal can show, JSON, numbers and indexes in words."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

# Control characters, line and paragraph separators, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SPACING = re.compile("([\n\t])")


def prepare_streams() -> None:
    """See to it that the standard streams are open, and take any text.

    One that is closed becomes the null device, before a file of a store gets its number. A stream
    that cannot write a character writes its escape.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        is_input = name == "stdin"
        if stream is None:
            null = os.open(os.devnull, os.O_RDONLY if is_input else os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "r" if is_input else "w", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if is_input else "backslashreplace")


def one_line(text: str) -> str:
    """Return a name with everything escaped that would break the line or move the cursor.

    A line end is shown as \\n and an escape as \\x1b, as in a string of Python.
    """
    return _UNPRINTABLE.sub(lambda one: one[0].encode("unicode_escape").decode("ascii"), text)


def printable(text: str) -> str:
    """Return a text as `one_line` does, but with its line ends and tabs."""
    return "".join(part if part in "\n\t" else one_line(part) for part in _SPACING.split(text))


def say(message: str, file: TextIO | None = None) -> None:
    """Print a message on one line of stderr, or of another file; above a bar if there is one."""
    tqdm.write(f"emt: {one_line(' '.join(message.split()))}", file=file or sys.stderr)


def print_json(value: Any) -> None:
    """Print one object on one line, in characters that stdout can write and a terminal shows."""
    text = _UNPRINTABLE.sub(
        lambda one: f"\\u{ord(one[0]):04x}", json.dumps(value, ensure_ascii=False)
    )
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


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
