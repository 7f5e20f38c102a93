"""The catalogue of a memory: settings, documents and removed rows, in one SQLite database.

A row id is the row's position in the order of writing. The catalogue says which ids are committed
(`num_rows`), which document owns each, and which are removed. One transaction commits documents
together with their rows, so a reader sees all of them or nothing; what a reader may ask is in
`reader.py`. `Catalog.in_memory` keeps the same tables in RAM for memories that are never saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memory_backends.catalog import schema
from memory_backends.catalog.database import (
    FILE_NAME,
    FORMAT_VERSION,
    as_store_error,
    check_size,
    check_version,
    connect,
    connect_to,
    transaction,
)
from memory_backends.catalog.documents import (
    delete_document,
    insert_document,
    insert_samples,
    write_row_checksums,
)
from memory_backends.catalog.metadata import check_metadata, write_metadata
from memory_backends.catalog.reader import CatalogReader, no_document
from memory_backends.catalog.records import NewDocument
from memory_backends.errors import MemoryMismatchError, StoreError
from memory_backends.layout import MemoryLayout, Metadata
from memory_backends.scope import joined


class Catalog(CatalogReader):
    """Settings, documents and removed rows of one memory: a `CatalogReader` that also writes.

    Safe to share between threads. One process writes at a time, which `Store.writing` sees to; each
    change is one transaction.
    """

    @classmethod
    def in_memory(
        cls, layout: MemoryLayout, identity: Mapping[str, Any], row_codec: str = "exact"
    ) -> Catalog:
        """Make an empty catalogue in RAM."""
        connection = connect_to(":memory:")
        with transaction(connection):
            for statement in schema.SCHEMA:
                connection.execute(statement)
            for key, value in {
                "format_version": FORMAT_VERSION,
                "layout": layout.to_json(),
                "identity": dict(identity),
                "row_codec": row_codec,
                "num_rows": 0,
            }.items():
                schema.write_setting(connection, key, value)
        return cls(connection, None)

    @classmethod
    def open(cls, directory: Path) -> Catalog:
        """Open the catalogue in `directory`; documents are not read.

        Raises:
            StoreError: there is none, it is damaged, or of another format version.
        """
        path = directory / FILE_NAME
        with contextlib.ExitStack() as on_error:
            connection = connect(directory)
            on_error.callback(connection.close)
            with as_store_error(path):
                check_version(connection, directory)
                check_size(connection, path)
                schema.check_schema(connection)
                try:
                    catalog = cls(connection, path)
                except MemoryMismatchError as error:
                    raise StoreError(f"'{path}' is damaged: {error}") from error
            on_error.pop_all()
        return catalog

    def copy_to(
        self,
        directory: Path,
        row_crc32: Mapping[str, Mapping[int, int]],
        codec_states: Mapping[int, bytes] | None = None,
    ) -> None:
        """Write the catalogue to a directory with its rows, which that makes a store.

        The settings of an index stay behind. `row_crc32` are by document and layer, `codec_states`,
        if they are not here before, by layer.
        """
        path = directory / FILE_NAME
        partial = directory / (FILE_NAME + ".partial")
        with as_store_error(path), self._lock:
            partial.unlink(missing_ok=True)
            with contextlib.closing(connect_to(partial)) as target:
                self.connection.backup(target)
                with transaction(target):
                    target.execute("DELETE FROM settings WHERE key = 'index'")
                    for name, checksums in row_crc32.items():
                        write_row_checksums(target, name, checksums)
                    schema.write_codec_states(target, codec_states or {})
            partial.replace(path)

    def copy_in_memory(self) -> Catalog:
        """Return a copy of the catalogue in RAM."""
        connection = connect_to(":memory:")
        with self._lock, as_store_error(self.path):
            self.connection.backup(connection)
        return Catalog(connection, None)

    # -- writing --------------------------------------------------------------------------------

    def set_setting(self, key: str, value: Any) -> None:
        """Store a setting (plain JSON types)."""
        with self._transaction():
            schema.write_setting(self.connection, key, value)

    def choose_fine_heads(self, heads: Mapping[int, Sequence[int]]) -> None:
        """Keep the keys of some heads more finely, of a catalogue that is not yet a store's."""
        self.set_setting("fine_heads", {str(idx): sorted(set(of)) for idx, of in heads.items()})
        self.read_coding()

    def commit(
        self,
        documents: Sequence[NewDocument],
        *,
        query_heads: Mapping[int, int] | None = None,
        codec_states: Mapping[int, bytes] | None = None,
        moved_crc32: Mapping[str, Mapping[int, int]] | None = None,
        replace: bool = False,
    ) -> list[range]:
        """Make documents and their rows visible, in one transaction; return each one's row ids.

        They come in the order of their rows, which are those after `num_rows`. `codec_states` are
        what the codec has learned now, by layer; then `moved_crc32` has new checksums of the rows
        of all documents that were there, and an index of these is out of force. `query_heads` are
        of the layers that get their first samples. A name that is taken is a DocumentError, unless
        its document is to be replaced.
        """
        ids = []
        with self._transaction():
            first = int(schema.read_setting(self.connection, "num_rows"))
            sampled = self.query_samples()
            schema.write_codec_states(self.connection, codec_states or {})
            for name, row_crc32 in (moved_crc32 or {}).items():
                write_row_checksums(self.connection, name, row_crc32)
            if moved_crc32:
                self.connection.execute("DELETE FROM settings WHERE key = 'index'")
            for new in documents:
                if replace:
                    delete_document(self.connection, new.document.name)
                insert_document(self.connection, new, first)
                insert_samples(self.connection, new.samples, sampled, query_heads or {})
                ids.append(range(first, first + len(new.row_tokens)))
                first = ids[-1].stop
            if any(new.samples for new in documents):
                schema.write_setting(self.connection, "query_samples", sampled)
            schema.write_setting(self.connection, "num_rows", first)
        self.num_rows = first
        return ids

    def set_metadata(self, name: str, metadata: Metadata) -> None:
        """Give a document metadata, in place of what it has.

        Raises:
            DocumentError: there is no document of that name, or this is no metadata.
        """
        check_metadata(metadata, name)
        with self._transaction():
            write_metadata(self.connection, self._span(name)[0], metadata)

    def remove_document(self, name: str) -> int:
        """Remove a document; return how many rows it had. A DocumentError if there is none."""
        with self._transaction():
            removed = delete_document(self.connection, name)
        if removed is None:
            raise no_document(name)
        return removed

    def remove_rows(self, ids: Iterable[int]) -> None:
        """Remove single rows; others keep their ids. A MemoryMismatchError if one never was."""
        wanted = np.unique(np.fromiter(ids, dtype=np.int64))
        outside = wanted[(wanted < 0) | (wanted >= self.num_rows)]
        if len(outside):
            raise MemoryMismatchError(
                f"row ids must be 0 or more and less than {self.num_rows}, the rows written so "
                f"far; got {outside[:5].tolist()}."
            )
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)  # of consecutive ids
        with self._transaction():
            for run in runs:
                if len(run):
                    schema.write_removed(self.connection, int(run[0]), int(run[-1]) + 1)

    def remove_all(self) -> None:
        """Remove every document and row. Ids are not used again."""
        with self._transaction():
            self.connection.execute("DELETE FROM documents")
            self.connection.execute("DELETE FROM metadata")
            schema.write_removed(self.connection, 0, self.num_rows)

    def vacuum(self) -> None:
        """Join removed spans that touch, and give the space of what was removed back."""
        with self._transaction():
            spans = list(schema.read_removed(self.connection))
            self.connection.execute("DELETE FROM removed")
            for first, stop in joined(spans):
                schema.write_removed(self.connection, first, stop)
        with self._lock, as_store_error(self.path):
            self.connection.execute("VACUUM")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, as_store_error(self.path), transaction(self.connection):
            yield
