"""The catalogue of a memory: settings, documents and removed rows, in one SQLite database.

A row id is the row's position in the order of writing. The catalogue says which ids are published
(`num_rows`), which document owns each, and which are removed. One transaction publishes a document
together with its rows, so a reader sees all of it or nothing. `Catalog.in_memory` keeps the same
tables in RAM for memories that are never saved.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memory_backends.errors import DocumentError, EMTError, MemoryMismatchError, StoreError
from memory_backends.layout import Document, Int32Array, Int64Array, MemoryLayout, StoredDocument

FILE_NAME = "catalog.sqlite"
FORMAT_VERSION = 1

_SCHEMA = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    name TEXT PRIMARY KEY,
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    token_ids BLOB NOT NULL,      -- int32 (num_tokens,)
    row_tokens BLOB NOT NULL,     -- int32 (num_rows,): each row's index into token_ids
    sinks BLOB NOT NULL,          -- int32: which of the document's rows are attention sinks
    offsets BLOB,                 -- int32 (num_tokens, 2): characters of text
    text TEXT
);
CREATE UNIQUE INDEX documents_by_row ON documents (first_row);
CREATE TABLE removed (first_row INTEGER PRIMARY KEY, stop_row INTEGER NOT NULL);
CREATE TABLE checksums (         -- crc32 of what one write appended to one layer's file
    layer INTEGER NOT NULL,
    first_row INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    crc32 INTEGER NOT NULL,
    PRIMARY KEY (layer, first_row)
) WITHOUT ROWID;
"""


class Catalog:
    """Settings, documents and removed rows of one memory. Safe to share between threads.

    Attributes:
        path: the database file; None if it is in RAM.
        layout: the shape of the rows.
        identity: what the model that writes the rows looks like, as plain JSON types.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self.path = path
        weakref.finalize(self, connection.close)
        self.layout = MemoryLayout.from_json(self.setting("layout"))
        self.identity: Mapping[str, Any] = self.setting("identity")

    @classmethod
    def in_memory(cls, layout: MemoryLayout, identity: Mapping[str, Any]) -> Catalog:
        """Make an empty catalogue that lives in RAM."""
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        _initialise(connection, layout, identity)
        return cls(connection, None)

    @classmethod
    def open(cls, directory: Path) -> Catalog:
        """Open the catalogue in `directory`; documents are not read.

        Raises:
            StoreError: there is none, it is not one of ours, or a newer emt wrote it.
        """
        path = directory / FILE_NAME
        if not path.is_file():
            raise StoreError(
                f"expected a memory store with a {FILE_NAME} at '{directory}'; found none. "
                "Write one with `emt index` or `Memory.write`, or correct the path."
            )
        with _as_store_error(path), contextlib.ExitStack() as on_error:
            connection = sqlite3.connect(path, timeout=30, check_same_thread=False)
            on_error.callback(connection.close)
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA synchronous = FULL")
            found = json.loads(_setting(connection, "format_version") or "null")
            if found != FORMAT_VERSION:
                raise StoreError(
                    f"'{path}' has format version {found}; this emt reads version "
                    f"{FORMAT_VERSION}. Use the emt version that wrote the store, or write the "
                    "store again."
                )
            try:
                catalog = cls(connection, path)
            except MemoryMismatchError as error:
                raise StoreError(f"'{path}' is damaged: {error}") from error
            on_error.pop_all()
        return catalog

    def close(self) -> None:
        """Close the database; the object is of no use afterwards."""
        self._connection.close()

    def copy_to(self, directory: Path, checksums: Mapping[int, int]) -> None:
        """Write the catalogue to another directory, without the settings of an index.

        Args:
            directory: has the rows already; with the catalogue it becomes a store.
            checksums: layer -> crc32 of all its rows, for a catalogue in RAM, which has none.

        Raises:
            StoreError: the directory cannot be written.
        """
        path = directory / FILE_NAME
        partial = directory / (FILE_NAME + ".partial")
        with _as_store_error(path), self._lock:
            partial.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(partial)) as target:
                self._connection.backup(target)
                with target:
                    target.execute("DELETE FROM settings WHERE key = 'index'")
                    if self.path is None:
                        _put_checksums(target, checksums, 0, self.num_rows)
            partial.replace(path)

    def copy_in_memory(self) -> Catalog:
        """Return a copy of the catalogue that lives in RAM."""
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        with self._reading():
            self._connection.backup(connection)
        return Catalog(connection, None)

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse a model that did not write this memory.

        Fields that only one of the two has, such as a tokenizer, are not compared.

        Raises:
            MemoryMismatchError: naming every field that differs.
        """
        where = "memory" if self.path is None else f"memory at '{self.path.parent}'"
        wrong = [
            f"{key}: the memory has {self.identity[key]!r}, this model {identity[key]!r}"
            for key in sorted(self.identity.keys() & identity.keys())
            if self.identity[key] != identity[key]
        ]
        if wrong:
            raise MemoryMismatchError(
                f"{where} was written by another model; " + "; ".join(wrong) + ". "
                "Load the model that wrote it, or index the documents again with this one."
            )

    # -- settings -------------------------------------------------------------------------------

    def setting(self, key: str) -> Any:
        """Return a setting as plain JSON types, or None."""
        with self._reading():
            value = _setting(self._connection, key)
            return None if value is None else json.loads(value)

    def set_setting(self, key: str, value: Any) -> None:
        """Store a setting (plain JSON types)."""
        with self._transaction():
            _put_setting(self._connection, key, value)

    @property
    def num_rows(self) -> int:
        """Rows ever published, removed ones included: the next row gets this id."""
        return int(self.setting("num_rows"))

    # -- documents ------------------------------------------------------------------------------

    def publish(
        self,
        document: Document,
        row_tokens: Int32Array,
        sinks: Int32Array,
        checksums: Mapping[int, int],
        *,
        replace: bool = False,
    ) -> range:
        """Make a document and its rows visible, in one transaction.

        Args:
            document: the document; its rows are the `len(row_tokens)` rows after `num_rows`.
            row_tokens: (n,) index into `document.token_ids` of each row.
            sinks: which of the n rows are attention sinks.
            checksums: layer -> crc32 of the bytes these rows take in the layer's file, if any.
            replace: remove the document of that name first, in the same transaction.

        Returns:
            The ids of the rows.

        Raises:
            DocumentError: the name is taken and `replace` is False.
        """
        with self._transaction():
            if replace:
                self._remove_document(document.name)
            first = self.num_rows
            try:
                self._connection.execute(
                    "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        document.name,
                        first,
                        len(row_tokens),
                        len(document.token_ids),
                        _blob(document.token_ids),
                        _blob(row_tokens),
                        _blob(sinks),
                        None if document.offsets is None else _blob(document.offsets),
                        document.text,
                    ),
                )
            except sqlite3.IntegrityError as error:
                raise DocumentError(
                    f"document '{document.name}' is already in the memory. "
                    "Remove it first, or give this one another name."
                ) from error
            _put_checksums(self._connection, checksums, first, len(row_tokens))
            _put_setting(self._connection, "num_rows", first + len(row_tokens))
        return range(first, first + len(row_tokens))

    def document_names(self) -> list[str]:
        """Return the names of all documents, in the order they were written."""
        return [str(name) for (name,) in self._all("SELECT name FROM documents ORDER BY first_row")]

    def has_document(self, name: str) -> bool:
        """Tell whether a document of that name is in the memory."""
        return bool(self._all("SELECT 1 FROM documents WHERE name = ?", name))

    def document(self, name: str) -> StoredDocument:
        """Read one document with its text, token ids and offsets.

        Raises:
            DocumentError: there is none of that name.
        """
        found = self._all(
            "SELECT name, first_row, token_ids, row_tokens, sinks, offsets, text "
            "FROM documents WHERE name = ?",
            name,
        )
        if not found:
            raise _no_document(name)
        (name, first_row, token_ids, row_tokens, sinks, offsets, text) = found[0]
        return StoredDocument(
            name=name,
            token_ids=np.frombuffer(token_ids, dtype="<i4"),
            text=text,
            offsets=None if offsets is None else np.frombuffer(offsets, dtype="<i4").reshape(-1, 2),
            first_row=first_row,
            row_tokens=np.frombuffer(row_tokens, dtype="<i4"),
            sink_rows=np.frombuffer(sinks, dtype="<i4"),
        )

    def document_sizes(self) -> list[tuple[str, int, int]]:
        """Return (name, tokens, rows) of every document, in the order they were written."""
        return [
            (str(name), int(tokens), int(rows))
            for name, tokens, rows in self._all(
                "SELECT name, num_tokens, num_rows FROM documents ORDER BY first_row"
            )
        ]

    def document_of_rows(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the name of the document that owns each row; rows without one are left out."""
        spans = self._all("SELECT first_row, num_rows, name FROM documents ORDER BY first_row")
        firsts = np.array([first for first, _, _ in spans], dtype=np.int64)
        owners: dict[int, str] = {}
        for row in ids:
            at = int(np.searchsorted(firsts, row, side="right")) - 1
            if at >= 0 and row < spans[at][0] + spans[at][1]:
                owners[int(row)] = str(spans[at][2])
        return owners

    # -- rows -----------------------------------------------------------------------------------

    def remove_document(self, name: str) -> int:
        """Remove a document; its rows are never found again. Returns how many rows it had.

        Raises:
            DocumentError: there is none of that name.
        """
        with self._transaction():
            removed = self._remove_document(name)
        if removed is None:
            raise _no_document(name)
        return removed

    def remove_rows(self, ids: Iterable[int]) -> None:
        """Remove single rows; other ids keep their rows and their documents.

        Raises:
            MemoryMismatchError: an id was never published.
        """
        wanted = np.unique(np.fromiter(ids, dtype=np.int64))
        num_rows = self.num_rows
        outside = wanted[(wanted < 0) | (wanted >= num_rows)]
        if len(outside):
            raise MemoryMismatchError(
                f"row ids must be 0 or more and less than {num_rows}, the rows written so far; "
                f"got {outside[:5].tolist()}."
            )
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)  # of consecutive ids
        with self._transaction():
            self._mark_removed([(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)])

    def remove_all(self) -> None:
        """Remove every document and row. Ids are not used again."""
        with self._transaction():
            self._connection.execute("DELETE FROM documents")
            self._mark_removed([(0, self.num_rows)])

    def searchable_rows(self, sinks: str) -> Int64Array:
        """Return the ids that a search may find, ascending.

        Args:
            sinks: "all" for every row; "one" leaves out the attention sinks of all documents but
                the first that still has some, so that the memory has exactly one set of them.
        """
        with self._snapshot():
            searchable = np.ones(self.num_rows, dtype=bool)
            for first, stop in self._connection.execute("SELECT first_row, stop_row FROM removed"):
                searchable[first:stop] = False
            if sinks == "one":
                kept = False
                for first, blob in self._connection.execute(
                    "SELECT first_row, sinks FROM documents ORDER BY first_row"
                ):
                    rows = first + np.frombuffer(blob, dtype="<i4").astype(np.int64)
                    if kept:
                        searchable[rows] = False
                    kept = kept or bool(searchable[rows].any())
        return np.flatnonzero(searchable)

    def _remove_document(self, name: str) -> int | None:
        found = self._all("SELECT first_row, num_rows FROM documents WHERE name = ?", name)
        if not found:
            return None
        first, num_rows = found[0]
        self._connection.execute("DELETE FROM documents WHERE name = ?", (name,))
        self._mark_removed([(first, first + num_rows)])
        return int(num_rows)

    def _mark_removed(self, spans: list[tuple[int, int]]) -> None:
        self._connection.executemany(
            "INSERT INTO removed VALUES (?, ?) "
            "ON CONFLICT (first_row) DO UPDATE SET stop_row = max(stop_row, excluded.stop_row)",
            [(first, stop) for first, stop in spans if stop > first],
        )

    # -- plumbing -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, _as_store_error(self.path):
            yield

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Read one state of the database, whatever other processes write meanwhile."""
        with self._reading():
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.rollback()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _as_store_error(self.path), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    def _all(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self._reading():
            return self._connection.execute(query, parameters).fetchall()


def _initialise(
    connection: sqlite3.Connection, layout: MemoryLayout, identity: Mapping[str, Any]
) -> None:
    with connection:
        connection.executescript(_SCHEMA)
        for key, value in {
            "format_version": FORMAT_VERSION,
            "layout": layout.to_json(),
            "identity": dict(identity),
            "num_rows": 0,
        }.items():
            _put_setting(connection, key, value)


def _setting(connection: sqlite3.Connection, key: str) -> str | None:
    found = connection.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
    return None if found is None else str(found[0])


def _put_setting(connection: sqlite3.Connection, key: str, value: Any) -> None:
    connection.execute(
        "INSERT INTO settings VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (key, json.dumps(value, sort_keys=True)),
    )


def _put_checksums(
    connection: sqlite3.Connection, checksums: Mapping[int, int], first: int, num_rows: int
) -> None:
    connection.executemany(
        "INSERT INTO checksums VALUES (?, ?, ?, ?)",
        [(layer, first, num_rows, crc32) for layer, crc32 in checksums.items()],
    )


def _no_document(name: str) -> DocumentError:
    return DocumentError(f"no document '{name}' in this memory. `emt info` lists the documents.")


def _blob(array: Int32Array) -> bytes:
    return np.ascontiguousarray(array, dtype="<i4").tobytes()


@contextlib.contextmanager
def _as_store_error(path: Path | None) -> Iterator[None]:
    try:
        yield
    except EMTError:
        raise
    except (sqlite3.Error, OSError, ValueError) as error:  # ValueError: garbled text or JSON
        raise StoreError(
            f"the catalogue '{path or 'in memory'}' cannot be used: {error}. "
            "Check the disk and the permissions; if the file is damaged, restore it or index again."
        ) from error
