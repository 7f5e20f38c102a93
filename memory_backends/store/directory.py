"""A store's directory: what may lie at its path, and the names of its parts."""

from __future__ import annotations

import re
from pathlib import Path

from memory_backends.catalog.database import FILE_NAME as CATALOG_FILE_NAME
from memory_backends.errors import StoreError
from memory_backends.store.lock import LOCK_FILE_NAME, OWNER_FILE_NAME

INDEX_FOLDER = "index"
SHARDS_FILE_NAME = "shards.sqlite3"
SHARDS_PARTIAL = "shards.partial"  # a folder of shards that no document was written to yet


def has_no_store(path: Path) -> bool:
    """Return whether a store can be made at `path`: nothing is there, or nothing of worth.

    A process that was killed before it had made its store leaves a directory with its lock.
    """
    if not path.exists():
        return True
    locks = (LOCK_FILE_NAME, OWNER_FILE_NAME, OWNER_FILE_NAME + ".partial")
    # And SQLite's journals of files.
    partial = (CATALOG_FILE_NAME + ".partial", SHARDS_FILE_NAME, SHARDS_PARTIAL)
    return path.is_dir() and all(
        entry.name in locks or entry.name.startswith(partial) for entry in path.iterdir()
    )


def is_sharded(path: Path) -> bool:
    """Return whether there is a sharded store at `path`: one whose rows are in other stores."""
    return (path / SHARDS_FILE_NAME).is_file() and (path / CATALOG_FILE_NAME).exists()


def check_directory(path: Path) -> Path:
    """Return a path; raise a StoreError if it is a file."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"expected a store directory at '{path}'; it is a file. Give a directory.")
    return path


def check_free(path: Path) -> Path:
    """Return a path; raise a StoreError if a file or a directory that is not empty is there."""
    if not has_no_store(check_directory(path)):
        raise StoreError(
            f"expected a new or an empty directory at '{path}'; it is not empty. "
            "Save to another directory."
        )
    return path


def check_generation(generation: object) -> str:
    """Return the name of an index's folder; raise a StoreError if it is not six digits."""
    if not (isinstance(generation, str) and re.fullmatch(r"[0-9]{6}", generation)):
        raise StoreError(
            f"an index generation must be six digits, such as '000001'; got {generation!r:.80}. "
            "The store is damaged: restore its catalogue."
        )
    return generation
