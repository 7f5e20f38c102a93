"""`SingleStore`: a memory whose rows are its own, in one directory or in RAM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from memory_backends.layout import Metadata
from memory_backends.store.batch import Batch
from memory_backends.store.compaction import compact
from memory_backends.store.copying import copy_store
from memory_backends.store.store import Store


class SingleStore(Store):
    """A store that holds its rows itself."""

    def batch(self, *, replace: bool) -> Batch:
        """Return an empty batch."""
        return Batch(self, replace=replace)

    def remove_document(self, name: str) -> int:
        """Remove a document; return how many rows it had."""
        return self.catalog.remove_document(name)

    def remove_rows(self, ids: Iterable[int]) -> None:
        """Remove single rows."""
        self.catalog.remove_rows(ids)

    def remove_all(self) -> None:
        """Remove every document and row."""
        self.catalog.remove_all()

    def set_metadata(self, name: str, metadata: Metadata) -> None:
        """Give a document metadata, in place of what it has."""
        self.catalog.set_metadata(name, metadata)

    def compact(self) -> int:
        """Make holes of the rows that no document has; return the bytes given back."""
        return compact(self)

    def copy_to(self, directory: Path) -> None:
        """Write a copy of the memory to an empty directory."""
        copy_store(self, directory)
