"""Which documents of a stream a store must read, and how many it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from emt.errors import DocumentError
from memory_backends import Document, MemoryBackend, Rows, content_hash


class Written(NamedTuple):
    """What became of a stream of documents.

    Attributes:
        added: new ones.
        replaced: those that were there with other content.
        skipped: those that were there already, word for word; the model did not read them. Their
            metadata is the stream's, if it has some.
    """

    added: int
    replaced: int
    skipped: int


class Changes:
    """The documents of a stream that a store does not have yet, while they are written to it.

    Args:
        backend: the store.
        documents: names must come once.

    Iterating reads the stream; `published` counts what has become part of the store.
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
                given = document.metadata
                if given is not None and catalog.metadata(name) != given:
                    catalog.set_metadata(name, given)
                self._skipped += 1
                continue
            if catalog.has_document(name):
                self._replacing.add(name)
            yield document

    def published(self, name: str) -> None:
        """Take notice that a document is part of the store now."""
        if name in self._replacing:
            self._replacing.remove(name)
            self._replaced += 1
        else:
            self._added += 1

    @property
    def counts(self) -> Written:
        """How many documents were written so far."""
        return Written(self._added, self._replaced, self._skipped)


def reported(rows: Iterator[Rows], on_rows: Callable[[int], object] | None) -> Iterator[Rows]:
    """Pass rows on, and tell `on_rows` how many, each time the store has taken some."""
    for run in rows:
        yield run
        if on_rows is not None:
            on_rows(len(run))
