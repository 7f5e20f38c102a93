"""Where memories are stored and searched. Knows torch, numpy and FAISS; no language model."""

from memory_backends.base import MemoryBackend, SearchResult
from memory_backends.errors import (
    DocumentError,
    EMTError,
    IndexFactoryError,
    MemoryMismatchError,
    StoreError,
)
from memory_backends.layout import Document, LayerLayout, MemoryLayout, Rows, StoredDocument
from memory_backends.manual import ManualBackend
from memory_backends.migration import upgrade
from memory_backends.records import content_hash
from memory_backends.scope import Scope
from memory_backends.vector_db import VectorDBBackend
from memory_backends.verify import Damage, verify

__all__ = [
    "Damage",
    "Document",
    "DocumentError",
    "EMTError",
    "IndexFactoryError",
    "LayerLayout",
    "ManualBackend",
    "MemoryBackend",
    "MemoryLayout",
    "MemoryMismatchError",
    "Rows",
    "Scope",
    "SearchResult",
    "StoreError",
    "StoredDocument",
    "VectorDBBackend",
    "content_hash",
    "upgrade",
    "verify",
]
