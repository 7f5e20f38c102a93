"""What the parts of the suite have in common: how a backend is made, and documents for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from memory_backends.backend import MemoryBackend
from memory_backends.layout import MemoryLayout, Rows
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_document, make_rows

Make = Callable[..., MemoryBackend]


class Suite:
    """Tests of one kind of backend.

    Attributes:
        memory_type: its name in the registry.
        options: arguments of `MemoryBackend`, those of the searcher among them.
        has_path: whether memories are kept in a directory from the start.
        other_type: another kind of backend that opens the same stores.
    """

    memory_type: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    has_path: ClassVar[bool] = False
    other_type: ClassVar[str] = "manual"

    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        """Return (layout=LAYOUT, **options) -> an empty backend."""
        numbers = iter(range(100))

        def new(layout: MemoryLayout = LAYOUT, **options: Any) -> MemoryBackend:
            place = {"path": tmp_path / f"store-{next(numbers)}"} if self.has_path else {}
            return MemoryBackend(layout, self.memory_type, **{**self.options, **place, **options})

        return new

    def open(self, path: Path, **options: Any) -> MemoryBackend:
        """Open a store."""
        return MemoryBackend.open(path, self.memory_type, **{**self.options, **options})

    def filled(self, backend: MemoryBackend) -> MemoryBackend:
        """Write the documents 'a' (rows 0-9, sink 0) and 'b' (rows 10-16, sink 10)."""
        for name, rows in zip("ab", self.runs, strict=True):
            backend.add(make_document(name, len(rows)), [rows])
        return backend

    @pytest.fixture
    def store(self, make: Make, tmp_path: Path) -> Path:
        """Return a saved store of the two documents."""
        backend = self.filled(make(identity=IDENTITY))
        path = tmp_path / "saved"
        backend.save(path)
        backend.close()
        return path

    @property
    def runs(self) -> list[Rows]:
        """The rows of the two documents."""
        return [make_rows(10, seed=1, sinks=[0]), make_rows(7, seed=2, sinks=[0])]
