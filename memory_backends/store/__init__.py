"""A memory's parts in one directory or in RAM: written, copied, compacted, verified."""

from memory_backends.store.single import SingleStore
from memory_backends.store.store import Store

__all__ = ["SingleStore", "Store"]
