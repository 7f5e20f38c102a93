"""The SQLite database of a store: connections, transactions, its format version."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from memory_backends.errors import EMTError, StoreError, StoreVersionError, refuse_link

FILE_NAME = "catalog.sqlite"
FORMAT_VERSION = 1


def connect(directory: Path) -> sqlite3.Connection:
    """Connect to the catalogue of a store, whatever its version; a StoreError if there is none."""
    path = directory / FILE_NAME
    refuse_link(path)
    if not path.is_file():
        raise StoreError(
            f"expected a memory store with a {FILE_NAME} at '{directory}'; found none. "
            "Write one with `emt index` or `Memory.write`, or correct the path."
        )
    with as_store_error(path):
        return connect_to(path)


def connect_to(path: Path | str) -> sqlite3.Connection:
    """Connect to a database file, or to ":memory:"; transactions begin and end where we say."""
    connection = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def file_id(path: Path) -> tuple[int, int] | None:
    """Return what tells a file or folder from another one of that name; None if there is none.

    While somebody has a file open, no other one gets the same.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Make all changes of a block, or none if it or the disk fails."""
    try:  # Ctrl-C may come right after the beginning, too
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def check_version(connection: sqlite3.Connection, directory: Path) -> None:
    """Raise a StoreVersionError for a store of another format version."""
    record = connection.execute(
        "SELECT value FROM settings WHERE key = 'format_version'"
    ).fetchone()
    version = None if record is None else json.loads(str(record[0]))
    if version != FORMAT_VERSION:
        raise StoreVersionError(
            f"'{directory / FILE_NAME}' has format version {version}; this emt reads version "
            f"{FORMAT_VERSION}. Use the emt version that wrote the store, or write the store again."
        )


def check_size(connection: sqlite3.Connection, path: Path) -> None:
    """Raise a StoreError for a truncated database file; SQLite notices only when it reads there."""
    connection.execute("BEGIN")  # no writer changes the size meanwhile
    try:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        size = path.stat().st_size
    finally:
        connection.rollback()
    if size < pages * page_size:
        raise StoreError(
            f"'{path}' is truncated to {size} bytes; expected {pages * page_size} bytes. "
            "Restore the file from a copy, or index the documents again."
        )


@contextlib.contextmanager
def as_store_error(path: Path | None) -> Iterator[None]:
    """Turn what SQLite and the system say into a StoreError that names the catalogue."""
    try:
        yield
    except EMTError:
        raise
    # ValueError: garbled text or JSON; the others: values of another type than was written.
    except (sqlite3.Error, OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise StoreError(
            f"the catalogue '{path or 'in memory'}' cannot be used: {error}. "
            "Check the disk and the permissions; if the file is damaged, restore it or index again."
        ) from error
