"""Which documents of a stream a store must read, and how many it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from emt.errors import DocumentError
from memory_backends import Document, MemoryBackend, Rows
from memory_backends.catalog import Catalog


class Written(NamedTuple):
    """What became of a stream of documents.

    Attributes:
        added: new ones.
        replaced: those that were there with other content.
        skipped: those that were there already, word for word; the model did not read them.
    """

    added: int
    replaced: int
    skipped: int


def is_stored(catalog: Catalog, document: Document) -> bool:
    """Tell whether a store has a document of that name and content."""
    if not catalog.has_document(document.name):
        return False
    stored = catalog.document(document.name)
    return stored.text == document.text and np.array_equal(stored.token_ids, document.token_ids)


def add_all(
    backend: MemoryBackend, documents: Iterable[tuple[Document, Iterable[Rows]]]
) -> Iterator[str]:
    """Store documents, replacing those of the same names; yield each name once it is published."""
    for document, rows in documents:
        backend.add(document, rows, replace=True)
        yield document.name


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
            if is_stored(catalog, document):
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
