"""The records of a run in a file of JSON lines, one a finished item, so that a run can resume.

The first line says what was asked for and where it ran. A run with the same settings goes on where
the file ends; a line that a kill has cut off is dropped, be it the first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emt.errors import ConfigError
from experiments.about import about

Header = dict[str, Any]
Items = dict[str, dict[str, Any]]


class Results:
    """The finished items of one run, in a file.

    Args:
        path: a `.jsonl` file; made with its folders if it is not there.
        experiment: its name.
        settings: what was asked for, as plain JSON types; a file of other settings is refused.

    Attributes:
        path: as given.
        header: the first line.
        items: key -> record, in the order they were finished.

    Raises:
        ConfigError: the file is of another experiment, of other settings, or no results file, or
            it cannot be made.
    """

    def __init__(self, path: Path | str, experiment: str, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.items: Items = {}
        wanted = json.loads(json.dumps({"experiment": experiment, "settings": dict(settings)}))
        if not self.path.exists() or _is_cut_header(self.path):
            self.header: Header = {**wanted, **about()}
            self._make()
            return
        self.header, self.items, num_bytes = _read(self.path)
        for name, value in wanted.items():
            if self.header.get(name) != value:
                raise ConfigError(
                    f"results '{self.path}' are of "
                    f"{_difference(name, self.header.get(name), value)}. "
                    "Give this run another output, or delete the file."
                )
        if num_bytes < self.path.stat().st_size:
            os.truncate(self.path, num_bytes)

    def __contains__(self, key: object) -> bool:
        return key in self.items

    def __len__(self) -> int:
        return len(self.items)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep one finished item; it is on the disk when this returns.

        Raises:
            ValueError: the key is there already.
        """
        if key in self.items:
            raise ValueError(f"item '{key}' is in '{self.path}' already.")
        self._append({"key": key, **record})
        self.items[key] = dict(record)

    def _make(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            self._append(self.header)
        except OSError as error:
            reason = f"results '{self.path}' cannot be made: {error.strerror}."
            raise ConfigError(f"{reason} Give this run another output.") from error

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path | str) -> tuple[Header, Items]:
    """Return the header and the items of a results file.

    Raises:
        ConfigError: it cannot be read, or is no results file.
    """
    header, items, _ = _read(Path(path))
    return header, items


def _read(path: Path) -> tuple[Header, Items, int]:
    """Return header, items, and the number of bytes in whole lines."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"results '{path}' cannot be read: {error}") from error
    num_bytes = content.rfind(b"\n") + 1
    try:
        header, *records = [json.loads(line) for line in content[:num_bytes].splitlines()]
        items = {record.pop("key"): record for record in records}
        if "experiment" not in header:
            raise ValueError("no header")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"'{path}' is not a file of results: {error}. Give this run another output."
        ) from error
    return header, items, num_bytes


def _is_cut_header(path: Path) -> bool:
    """Tell whether a file is the start of a first line that a kill has cut off."""
    opening = b'{"experiment": "'
    try:
        content = path.read_bytes()
    except OSError:
        return False  # `_read` says why
    return b"\n" not in content and content[: len(opening)] == opening[: len(content)]


def _difference(name: str, before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{name} {before!r}, not {now!r}"
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    shown = ", ".join(f"{key} {before.get(key)!r} (now {now.get(key)!r})" for key in keys[:3])
    return f"other {name}: {shown}"
