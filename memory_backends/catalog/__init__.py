"""The catalogue of a memory, an SQLite database: settings, documents, removed rows."""

from memory_backends.catalog.catalog import Catalog
from memory_backends.catalog.database import FILE_NAME, FORMAT_VERSION

__all__ = ["FILE_NAME", "FORMAT_VERSION", "Catalog"]
