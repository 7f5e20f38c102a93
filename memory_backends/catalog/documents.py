"""Statements on the tables of documents and query samples, within the caller's transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from memory_backends.catalog import schema
from memory_backends.catalog.metadata import delete_metadata, write_metadata
from memory_backends.catalog.records import (
    COLUMNS,
    NewDocument,
    pack_crc32,
    record_crc32,
    to_record,
)
from memory_backends.errors import DocumentError, StoreError
from memory_backends.layout import Int64Array
from memory_backends.rows.query_samples import SampledLayer, Segment


def insert_document(connection: sqlite3.Connection, new: NewDocument, first: int) -> None:
    """Store a document whose rows begin at `first`; raise a DocumentError if its name is taken."""
    marks = ", ".join("?" * 12)
    try:
        connection.execute(f"INSERT INTO documents VALUES ({marks})", to_record(new, first))
    except sqlite3.IntegrityError as error:
        raise name_taken(new.document.name) from error
    write_metadata(connection, first, new.document.metadata or {})


def insert_samples(
    connection: sqlite3.Connection,
    added: Mapping[int, Segment],
    sampled: dict[int, SampledLayer],
    query_heads: Mapping[int, int],
) -> None:
    """Store what a document added to the samples, by layer, and count it in `sampled`.

    `query_heads` are those of the layers that are not in `sampled` yet.
    """
    for layer_idx, segment in added.items():
        if layer_idx not in sampled:
            sampled[layer_idx] = SampledLayer(query_heads[layer_idx], 0)
        num_heads, first = sampled[layer_idx]
        connection.execute(
            "INSERT INTO query_samples VALUES (?, ?, ?, ?)",
            (layer_idx, first, segment.num_samples, segment.crc32),
        )
        sampled[layer_idx] = SampledLayer(num_heads, first + segment.num_samples)


def delete_document(connection: sqlite3.Connection, name: str) -> int | None:
    """Remove a document; return how many rows it had, None if there is no such document."""
    query = "SELECT first_row, num_rows FROM documents WHERE name = ?"
    record = connection.execute(query, (name,)).fetchone()
    if record is None:
        return None
    first, num_rows = record
    connection.execute("DELETE FROM documents WHERE name = ?", (name,))
    delete_metadata(connection, first)
    schema.write_removed(connection, first, first + num_rows)
    return int(num_rows)


def write_row_checksums(
    connection: sqlite3.Connection, name: str, row_crc32: Mapping[int, int]
) -> None:
    """Store the checksums of a document's rows, by layer."""
    query = f"SELECT {COLUMNS} FROM documents WHERE name = ?"
    record = connection.execute(query, (name,)).fetchone()
    values = (*record[:-1], pack_crc32(row_crc32))
    connection.execute(
        "UPDATE documents SET row_crc32 = ?, crc32 = ? WHERE name = ?",
        (values[-1], record_crc32(values), name),
    )


def read_sinks(connection: sqlite3.Connection, num_rows: int) -> Iterator[Int64Array]:
    """Yield the ids of the attention sinks of each document that begins before `num_rows`."""
    query = (
        "SELECT name, first_row, num_rows, sinks FROM documents WHERE first_row < ? "
        "ORDER BY first_row"
    )
    for name, first, rows, blob in connection.execute(query, (num_rows,)):
        places = np.frombuffer(blob, dtype="<i4").astype(np.int64)
        stop = min(rows, num_rows - first)
        if len(places) and not (first >= 0 <= places.min() <= places.max() < stop):
            raise StoreError(f"the record of document {name!r:.200} is damaged. Run `emt verify`.")
        yield first + places


def keep_one_set_of_sinks(
    connection: sqlite3.Connection, searchable: npt.NDArray[np.bool_]
) -> None:
    """Mark attention sinks as not searchable, but for the first document that still has some.

    `searchable`, (num_rows,), is changed in place; documents after its end are left out.
    """
    kept = False
    for rows in read_sinks(connection, len(searchable)):
        if kept:
            searchable[rows] = False
        kept = kept or bool(searchable[rows].any())


def name_taken(name: str) -> DocumentError:
    """Return the error of a name that another document has."""
    return DocumentError(
        f"document '{name}' is already in the memory. "
        "Remove it first, or give this one another name."
    )
