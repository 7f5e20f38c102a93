"""A document as the catalogue keeps it: the columns of one record, checked when they are read.

Every record has the crc32 of its other columns, so what a disk has changed is found before it is
used. Lengths are compared with each other before an array is made of them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from memory_backends.errors import StoreError
from memory_backends.layout import Document, Int32Array, StoredDocument
from memory_backends.rows.query_samples import Segment

COLUMNS = (
    "name, first_row, num_rows, num_tokens, token_ids, row_tokens, sinks, offsets, text, "
    "content_hash, row_crc32"
)


class NewDocument(NamedTuple):
    """A document whose rows are appended and wait to be committed."""

    document: Document
    row_tokens: Int32Array  # (n,) index into `document.token_ids` of each row
    sinks: Int32Array  # which of the n rows are attention sinks
    samples: Mapping[int, Segment]  # layer -> the query samples that came with it
    row_crc32: Mapping[int, int]  # layer -> of the rows' records, once flushed; {} without files


class RecordSpan(NamedTuple):
    """Where one document's rows are, and the crc32 of its records, layer by layer."""

    name: str
    first: int
    stop: int
    row_crc32: tuple[int, ...]


def content_hash(document: Document) -> str:
    """Return the sha256 of a document's text, or of its token ids if it has none, in hex."""
    if document.text is not None:
        return hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).hexdigest()
    return hashlib.sha256(_blob(document.token_ids)).hexdigest()


def record_crc32(values: Iterable[Any]) -> int:
    """Return the crc32 of a record's columns: their types, lengths and contents."""
    crc32 = 0
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        crc32 = zlib.crc32(f"{type(value).__name__} {len(data)} ".encode(), crc32)
        crc32 = zlib.crc32(data, crc32)
    return crc32


def to_record(new: NewDocument, first: int) -> tuple[Any, ...]:
    """Return the columns of a document whose rows begin at `first`, and their crc32."""
    document = new.document
    values = (
        document.name,
        first,
        len(new.row_tokens),
        len(document.token_ids),
        _blob(document.token_ids),
        _blob(new.row_tokens),
        _blob(new.sinks),
        None if document.offsets is None else _blob(document.offsets),
        document.text,
        content_hash(document),
        pack_crc32(new.row_crc32),
    )
    return (*values, record_crc32(values))


def from_record(record: tuple[Any, ...], num_rows: int) -> StoredDocument:
    """Read a record, `COLUMNS` and the crc32, of `num_rows` rows; a StoreError if damaged."""
    damage = _damage(record, num_rows)
    if damage:
        raise damaged(f"the record of document {record[0]!r:.200}", damage)
    (name, first_row, _, _, token_ids, row_tokens, sinks, offsets, text, *_) = record
    return StoredDocument(
        name=name,
        token_ids=np.frombuffer(token_ids, dtype="<i4"),
        text=text,
        offsets=None if offsets is None else np.frombuffer(offsets, dtype="<i4").reshape(-1, 2),
        first_row=first_row,
        row_tokens=np.frombuffer(row_tokens, dtype="<i4"),
        sink_rows=np.frombuffer(sinks, dtype="<i4"),
    )


def pack_crc32(row_crc32: Mapping[int, int]) -> bytes:
    """Return checksums as a column: uint32 each, layers ascending."""
    ordered = [row_crc32[layer_idx] for layer_idx in sorted(row_crc32)]
    return np.array(ordered, dtype="<u4").tobytes()


def unpack_crc32(column: bytes) -> tuple[int, ...]:
    """Return what `pack_crc32` packed, layers ascending."""
    return tuple(np.frombuffer(column, dtype="<u4").tolist())


def damaged(part: str, damage: str = "its checksum does not match") -> StoreError:
    """Return the error of a part of the catalogue that cannot be used."""
    return StoreError(
        f"{part} is damaged: {damage}. `emt verify` lists all damage; restore the store from a "
        "copy, or index the documents again."
    )


def _damage(record: tuple[Any, ...], num_rows: int) -> str | None:
    """Return what is wrong with a record, or None."""
    *values, crc32 = record
    if record_crc32(values) != crc32:
        return "its checksum does not match"
    (name, first, rows, tokens, token_ids, row_tokens, sinks, offsets, text, digest, crcs) = values
    numbers, blobs = (first, rows, tokens), (token_ids, row_tokens, sinks, crcs)
    if not (
        all(type(number) is int for number in numbers)
        and all(isinstance(blob, bytes) for blob in blobs)
        and isinstance(offsets, bytes | None)
        and isinstance(text, str | None)
        and isinstance(name, str)
        and isinstance(digest, str)
    ):
        return "a column has another type"
    if min(numbers) < 0 or first + rows > num_rows:
        return f"it has rows {first} to {first + rows - 1} of {num_rows}"
    if (
        len(token_ids) != 4 * tokens
        or len(row_tokens) != 4 * rows
        or len(sinks) % 4
        or len(crcs) % 4
        or (offsets is not None and len(offsets) != 8 * tokens)
    ):
        return "its columns have lengths that do not fit together"
    for column, stop in ((row_tokens, tokens), (sinks, rows)):
        indices = np.frombuffer(column, dtype="<i4")
        if len(indices) and not 0 <= indices.min() <= indices.max() < stop:
            return "an index is out of range"
    return None


def _blob(array: Int32Array) -> bytes:
    return np.ascontiguousarray(array, dtype="<i4").tobytes()
