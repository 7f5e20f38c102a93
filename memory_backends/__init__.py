"""Where memories are stored and searched. Knows torch, numpy and FAISS; no language model.

A backend is a store and a searcher. `MemoryBackend(layout, memory_type=...)` takes the searcher of
that name from a registry, to which `register_searcher` adds others; `memory_backends.testing` is
the suite that a backend with any searcher has to pass.
"""

from memory_backends.backend import MemoryBackend
from memory_backends.catalog.records import content_hash
from memory_backends.errors import (
    DocumentError,
    EMTError,
    IndexFactoryError,
    MemoryMismatchError,
    StoreError,
)
from memory_backends.layout import Document, LayerLayout, MemoryLayout, Rows, StoredDocument
from memory_backends.registry import memory_types, option_names, register_searcher
from memory_backends.scope import Scope
from memory_backends.search.scores import Search, SearchResult
from memory_backends.search.searcher import Searcher
from memory_backends.sharded.verify import verify
from memory_backends.store.verify import Damage

__all__ = [
    "Damage",
    "Document",
    "DocumentError",
    "EMTError",
    "IndexFactoryError",
    "LayerLayout",
    "MemoryBackend",
    "MemoryLayout",
    "MemoryMismatchError",
    "Rows",
    "Scope",
    "Search",
    "SearchResult",
    "Searcher",
    "StoreError",
    "StoredDocument",
    "content_hash",
    "memory_types",
    "option_names",
    "register_searcher",
    "verify",
]
