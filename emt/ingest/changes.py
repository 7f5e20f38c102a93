"""The documents of a stream that a store does not have yet, and counts of those written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from emt.errors import DocumentError
from memory_backends import Document, MemoryBackend, Rows, content_hash


class Written(NamedTuple):
    """How many documents of a stream were added, replaced and skipped.

    Attributes:
        added: new documents.
        replaced: documents that the store had with other content.
        skipped: documents that the store had with the same content. The model did not read them;
            metadata that the stream has for them was written.
    """

    added: int
    replaced: int
    skipped: int


class Changes:
    """The documents of a stream that a store does not have yet, while they are written to it.

    Iterating reads the stream, in which a name that comes twice is a `DocumentError`; `committed`
    counts what has become part of the store.
    """

    def __init__(self, backend: MemoryBackend, documents: Iterable[Document]) -> None:
        self._backend = backend
        self._documents = documents
        self._seen: set[str] = set()
        self._replacing: set[str] = set()
        self._added = self._replaced = self._skipped = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self._documents:
            name = document.name
            if name in self._seen:
                raise DocumentError(
                    f"document '{name}' comes twice. Give each document a name of its own."
                )
            self._seen.add(name)
            catalog = self._backend.catalog  # another one, once the store has been made
            if catalog.content_hash(name) == content_hash(document):
                metadata = document.metadata
                if metadata is not None and catalog.metadata(name) != metadata:
                    self._backend.set_metadata(name, metadata)
                self._skipped += 1
                continue
            if catalog.has_document(name):
                self._replacing.add(name)
            yield document

    def committed(self, name: str) -> None:
        """Count a document that has become part of the store."""
        is_replaced = name in self._replacing
        self._replaced += is_replaced
        self._added += not is_replaced

    @property
    def counts(self) -> Written:
        """The counts so far."""
        return Written(self._added, self._replaced, self._skipped)


def counting(rows: Iterator[Rows], on_rows: Callable[[int], object] | None) -> Iterator[Rows]:
    """Pass rows on; call `on_rows` with the number of those that the store has taken."""
    for run in rows:
        yield run
        if on_rows is not None:
            on_rows(len(run))
