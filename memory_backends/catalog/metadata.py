"""Metadata of documents: flat mappings, each in one record of the table `metadata`."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Collection, Iterator, Mapping

from memory_backends.catalog.records import damaged, record_crc32
from memory_backends.errors import DocumentError, StoreError
from memory_backends.layout import Metadata, MetadataValue

Where = Mapping[str, MetadataValue | Collection[MetadataValue]]

_INT_STOP = 2**63


def check_metadata(metadata: object, document: str) -> Metadata:
    """Return a document's metadata, if it can be kept.

    Raises:
        DocumentError: this is no mapping of text to text, numbers, True or False; a number is not
            finite or has more than 64 bits.
    """
    if not isinstance(metadata, Mapping):
        raise DocumentError(
            f"metadata of document '{document}' must be a mapping of text to text, numbers, True "
            f"or False; got {type(metadata).__name__}."
        )
    for key, value in metadata.items():
        if not _is_text(key) or not key:
            raise DocumentError(
                f"keys of the metadata of document '{document}' must be text; got {key!r:.80}."
            )
        if not is_value(value):
            raise DocumentError(
                f"metadata of document '{document}' must be text, a finite number of at most 64 "
                f"bits, True or False; got {value!r:.80} for {key!r:.80}. Make text of it, or "
                "several keys."
            )
    return metadata


def is_value(value: object) -> bool:
    """Tell whether metadata may have a value."""
    if isinstance(value, str):
        return _is_text(value)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool) or (isinstance(value, int) and -_INT_STOP <= value < _INT_STOP)


def check_where(where: object) -> dict[str, list[MetadataValue]]:
    """Return a filter as key -> values of which any will do; a DocumentError if it is none."""
    if not isinstance(where, Mapping):
        raise DocumentError(
            "where must be a mapping of keys of the metadata to a value, or to a list of values; "
            f"got {where!r:.80}."
        )
    filters = {}
    for key, wanted in where.items():
        is_list = isinstance(wanted, Collection) and not isinstance(wanted, str | bytes | Mapping)
        values = list(wanted) if is_list else [wanted]
        wrong = [value for value in values if not is_value(value)]
        if not isinstance(key, str) or wrong:
            raise DocumentError(
                "where must compare keys with text, numbers, True or False, or a list of them; "
                f"got {key!r:.80}: {wanted!r:.80}."
            )
        filters[key] = values
    return filters


def matches(metadata: Metadata, where: Mapping[str, Collection[MetadataValue]]) -> bool:
    """Tell whether metadata has, for every key, one of the wanted values; True is not 1."""
    return all(
        key in metadata
        and any(
            metadata[key] == value and isinstance(metadata[key], bool) == isinstance(value, bool)
            for value in values
        )
        for key, values in where.items()
    )


def write_metadata(connection: sqlite3.Connection, first_row: int, metadata: Metadata) -> None:
    """Store a document's metadata in place of its old; an empty mapping needs no record."""
    delete_metadata(connection, first_row)
    if not metadata:
        return
    text = json.dumps(dict(metadata), sort_keys=True, ensure_ascii=False)
    record = (first_row, text, record_crc32((first_row, text)))
    connection.execute("INSERT INTO metadata VALUES (?, ?, ?)", record)


def delete_metadata(connection: sqlite3.Connection, first_row: int) -> None:
    """Remove the metadata of the document at a row."""
    connection.execute("DELETE FROM metadata WHERE first_row = ?", (first_row,))


def read_metadata(
    connection: sqlite3.Connection, first_row: int | None = None
) -> Iterator[tuple[int, dict[str, MetadataValue]]]:
    """Yield (first_row, metadata) of one document, or of all that have some."""
    query = "SELECT first_row, value, crc32 FROM metadata"
    rest, values = ("", ()) if first_row is None else (" WHERE first_row = ?", (first_row,))
    for first, text, crc32 in connection.execute(query + rest, values):
        if record_crc32((first, text)) != crc32:
            raise damaged(f"the metadata of the document at row {first!r:.40}")
        metadata = json.loads(text)
        if not isinstance(metadata, dict) or not all(map(is_value, metadata.values())):
            raise StoreError(f"the metadata of the document at row {first!r:.40} is not flat.")
        yield first, metadata


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
