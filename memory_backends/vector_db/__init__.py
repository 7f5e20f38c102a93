"""The persistent FAISS store behind `memory_type="vector_db"`."""

from memory_backends.vector_db.backend import VectorDBBackend

__all__ = ["VectorDBBackend"]
