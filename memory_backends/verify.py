"""Reading a whole store and naming every file of it that is damaged.

Opening a store compares sizes and the checksums of what it reads; `verify` reads everything, in
parts of a few megabytes. Bytes past the published end of a file, and rows that no document has any
more, are nobody's: they are not damage.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from memory_backends import queries, rows, schema
from memory_backends.append_files import layer_file_name
from memory_backends.catalog import Catalog, joined
from memory_backends.compaction import PARTIAL
from memory_backends.database import FILE_NAME, as_store_error
from memory_backends.errors import EMTError, StoreError
from memory_backends.records import COLUMNS, from_record, unpack_crc32
from memory_backends.validation import check_directory

INDEX_FOLDER = "index"
GENERATION = re.compile(r"[0-9]{6}")

_BYTES_AT_ONCE = 2**22


class Damage(NamedTuple):
    """What is wrong with one file.

    Attributes:
        file: its path in the store, with "/" between the parts.
        reason: what was expected and what is there.
    """

    file: str
    reason: str


def verify(path: Path | str) -> list[Damage]:
    """Read all of a store; return its damage, an empty list if there is none.

    Raises:
        StoreError: there is no store at `path`, or one of another format version.
    """
    directory = check_directory(Path(path))
    if not (directory / FILE_NAME).is_file():
        Catalog.open(directory)  # says so
    try:
        catalog = Catalog.open(directory)
    except StoreError as error:
        if "has format version" in str(error):
            raise
        return [Damage(FILE_NAME, str(error))]
    try:
        with catalog.snapshot():
            return list(_Verification(directory, catalog).damage())
    except EMTError as error:  # of the database itself, on the way
        return [Damage(FILE_NAME, str(error))]
    finally:
        catalog.close()


class _Verification:
    """One reading of a store, within one snapshot of its catalogue."""

    def __init__(self, directory: Path, catalog: Catalog) -> None:
        self._directory = directory
        self._catalog = catalog
        self._connection = catalog.connection

    def damage(self) -> Iterator[Damage]:
        """Yield everything that is wrong."""
        found = list(self._attempt(self._catalog_damage))
        yield from found
        if not found:  # what the catalogue says about other files can be believed
            yield from self._row_damage()
            yield from self._sample_damage()
            yield from self._index_damage()

    def _attempt(self, check: Callable[[], Iterator[Damage]]) -> Iterator[Damage]:
        """Yield what a check of the catalogue finds, its failure too."""
        try:
            with as_store_error(self._directory / FILE_NAME):
                yield from check()
        except EMTError as error:
            yield Damage(FILE_NAME, str(error))

    # -- the catalogue --------------------------------------------------------------------------

    def _catalog_damage(self) -> Iterator[Damage]:
        for (message,) in self._connection.execute("PRAGMA integrity_check"):
            if message != "ok":
                yield Damage(FILE_NAME, f"SQLite's integrity check says: {message}")
        schema.check_schema(self._connection)
        for (key,) in self._connection.execute("SELECT key FROM settings").fetchall():
            schema.read_setting(self._connection, str(key))
        yield from self._document_damage()

    def _document_damage(self) -> Iterator[Damage]:
        published = self._catalog.num_rows
        num_layers = len(self._catalog.layout.layers)
        spans, end = [], 0
        query = f"SELECT {COLUMNS}, crc32 FROM documents ORDER BY first_row"
        for record in self._connection.execute(query):
            try:
                document = from_record(record, published)
            except StoreError as error:
                yield Damage(FILE_NAME, str(error))
                continue
            if len(unpack_crc32(record[10])) != num_layers:
                yield Damage(FILE_NAME, f"document '{document.name}' lacks checksums of its rows")
            if document.first_row < end:
                yield Damage(FILE_NAME, f"rows of document '{document.name}' are another's, too")
            end = document.first_row + len(document.row_tokens)
            spans.append((document.first_row, end))
        for first, stop in schema.read_removed(self._connection):
            if stop > published:
                yield Damage(FILE_NAME, f"rows {first} to {stop - 1} of {published} are removed")
            spans.append((first, stop))
        covered = joined(sorted(spans))
        if covered != ([(0, published)] if published else []):
            yield Damage(
                FILE_NAME,
                f"every row below {published} must be a document's or removed; got {covered[:5]}",
            )

    # -- the files ------------------------------------------------------------------------------

    def _row_damage(self) -> Iterator[Damage]:
        sizes = rows.record_bytes(self._catalog.layout)
        yield from self._extra_files(rows.FOLDER, sizes)
        for at, layer_idx in enumerate(sorted(sizes)):
            parts = (
                (f"document '{span.name}'", span.first, span.stop, span.row_crc32[at])
                for span in self._catalog.record_spans()
            )
            yield from _record_damage(
                self._directory,
                f"{rows.FOLDER}/{layer_file_name(layer_idx)}",
                sizes[layer_idx],
                self._catalog.num_rows,
                parts,
            )

    def _sample_damage(self) -> Iterator[Damage]:
        try:
            sampled = self._catalog.query_samples()
        except EMTError as error:
            yield Damage(FILE_NAME, str(error))
            return
        yield from self._extra_files(queries.FOLDER, sampled)
        query = (
            "SELECT first_sample, num_samples, crc32 FROM query_samples "
            "WHERE layer = ? ORDER BY first_sample"
        )
        for layer_idx, layer in sampled.items():
            end, parts = 0, []
            for first, count, crc32 in self._connection.execute(
                f"{query} ORDER BY 1", (layer_idx,)
            ):
                if first != end or type(count) is not int or count < 1:
                    yield Damage(FILE_NAME, f"samples {end} of layer {layer_idx} are missing")
                    break
                end = first + count
                parts.append((f"samples {first} to {end - 1}", first, end, crc32))
            else:
                head_dim = self._catalog.layout.layers[layer_idx].head_dim
                size = layer.num_heads * head_dim * queries.ITEMSIZE
                name = f"{queries.FOLDER}/{layer_file_name(layer_idx)}"
                yield from _record_damage(self._directory, name, size, end, parts)

    def _index_damage(self) -> Iterator[Damage]:
        saved = self._catalog.setting("index")
        if not saved:
            return
        generation = saved.get("generation") if isinstance(saved, dict) else None
        if not isinstance(generation, str) or not GENERATION.fullmatch(generation):
            yield Damage(FILE_NAME, f"index generation must be six digits; got {generation!r:.80}")
            return
        files = saved.get("files", {})
        for name, expected in files.items():
            file = f"{INDEX_FOLDER}/{generation}/{name}"
            if Path(name).name != name or name in (".", ".."):
                yield Damage(FILE_NAME, f"an index file must lie in its folder; got {name!r:.80}")
                continue
            path = self._directory / file
            if not path.is_file():
                yield Damage(file, "is missing")
                continue
            size, crc32 = path.stat().st_size, 0
            if size != expected["size"]:
                yield Damage(file, f"has {size} bytes; expected {expected['size']}")
                continue
            with path.open("rb") as opened:
                crc32 = _crc32(opened, size)
            if crc32 != expected["crc32"]:
                yield Damage(file, "its checksum does not match")

    def _extra_files(self, folder: str, layers: Iterable[int]) -> Iterator[Damage]:
        known = {layer_file_name(layer_idx) for layer_idx in layers}
        if not (self._directory / folder).is_dir():
            return
        for path in sorted((self._directory / folder).iterdir()):
            leftover = path.name.endswith(PARTIAL) or not self._catalog.num_rows
            if path.name not in known and not leftover:
                yield Damage(f"{folder}/{path.name}", "is not part of the store")


def _record_damage(
    directory: Path,
    name: str,
    record_bytes: int,
    num_records: int,
    parts: Iterable[tuple[str, int, int, Any]],
) -> Iterator[Damage]:
    """Compare the parts of a file, (what, first, stop, crc32) ascending, with their checksums."""
    if not num_records:
        return
    path, expected = directory / name, num_records * record_bytes
    if not path.is_file():
        yield Damage(name, f"is missing; expected {expected} bytes")
        return
    size = path.stat().st_size
    if size < expected:
        yield Damage(name, f"is truncated to {size} bytes; expected at least {expected}")
        return
    try:
        with path.open("rb") as file:
            for what, first, stop, crc32 in parts:
                file.seek(first * record_bytes)
                if _crc32(file, (stop - first) * record_bytes) != crc32:
                    yield Damage(name, f"{what}: the checksum does not match")
    except OSError as error:
        yield Damage(name, f"cannot be read: {error.strerror or error}")


def _crc32(file: BinaryIO, num_bytes: int) -> int:
    """Return the crc32 of the next bytes of a file, as many of them as there are."""
    crc32 = 0
    while num_bytes > 0 and (data := file.read(min(num_bytes, _BYTES_AT_ONCE))):
        crc32 = zlib.crc32(data, crc32)
        num_bytes -= len(data)
    return crc32
