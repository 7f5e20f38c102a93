"""Reading documents while the engine works: the committed state of the store, as one snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from emt.memory.memory import Memory
from memory_backends.catalog import Catalog


@contextlib.contextmanager
def committed(memory: Memory) -> Iterator[Catalog]:
    """Let any thread read documents in a `with` block, whatever is written meanwhile.

    The engine's own catalogue goes with the rows that it searches, and is as old as these; so a
    store's is opened anew.

    Raises:
        StoreError: the store cannot be read.
    """
    path = memory.backend.catalog.path
    if path is None:  # in RAM, or not yet made
        with memory.backend.catalog.snapshot():
            yield memory.backend.catalog
        return
    with contextlib.closing(Catalog.open(path.parent)) as catalog, catalog.snapshot():
        catalog.refresh()
        yield catalog
