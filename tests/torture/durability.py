"""What a power cut would lose: files that the catalogue speaks of before they are on the disk.

A killed process leaves what it wrote with the kernel, so killing finds no missing `fsync`. This
watches for it: at each commit every byte of every file of the store must be as it was when the file
was last synced, or be a hole where something was given back, and its name must have been in its
folder when that was synced.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

_NOT_DATA = ("catalog.sqlite", "write")  # SQLite sees to its own; the lock is no data


class Durability:
    """Compares a store with what of it was synced."""

    def __init__(self, folder: str, say: Callable[[str], None]) -> None:
        self._folder, self._say = Path(folder), say
        self._files: dict[Path, bytes] = {}
        self._names: dict[Path, set[str]] = {}
        for path in self._all() if self._folder.exists() else []:  # there before: all is synced
            self._synced(path)

    def fsync(self, descriptor: int) -> None:
        """Note that a file or a folder is on the disk as it is now."""
        self._synced(Path(f"/proc/self/fd/{descriptor}").readlink())

    def renamed(self, target: str) -> None:
        """Note that a name stands for another file now, until its folder is synced."""
        path = Path(target)
        self._names.setdefault(path.parent, set()).discard(path.name)

    def check_commit(self) -> None:
        """Say which files and names would be missing if the power failed after this commit."""
        for path in self._all():
            if path.name.startswith(_NOT_DATA) or path == self._folder:
                continue
            if path.is_file() and not _within(path, self._files.get(path)):
                self._say(f"unsynced content {path.relative_to(self._folder)}")
            if path.name not in self._names.get(path.parent, set()):
                self._say(f"unsynced name {path.relative_to(self._folder)}")

    def check_end(self) -> None:
        """Say whether the catalogue's own name may be lost."""
        catalog = self._folder / "catalog.sqlite"
        known = self._names.get(self._folder)
        if catalog.exists() and (known is None or catalog.name not in known):
            self._say("unsynced name catalog.sqlite")

    def _all(self) -> list[Path]:
        return [self._folder, *self._folder.rglob("*")]

    def _synced(self, path: Path) -> None:
        if path.is_dir():
            self._names[path] = {entry.name for entry in path.iterdir()}
        elif path.exists():
            self._files[path] = path.read_bytes()


def _within(path: Path, synced: bytes | None) -> bool:
    """Tell whether all that a file has is in what was synced of it."""
    now = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    if synced is None or len(synced) < len(now):
        return False
    before = np.frombuffer(synced, dtype=np.uint8)[: len(now)]
    return bool(((now == before) | (now == 0)).all())
