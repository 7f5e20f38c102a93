"""Reading a whole store and naming every file of it that is damaged.

Opening a store compares sizes and the checksums of what it reads; `verify` reads everything, in
parts of a few megabytes. Bytes past the committed end of a file, and rows that no document has any
more, are nobody's: they are not damage.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from memory_backends.catalog import Catalog, schema
from memory_backends.catalog.database import FILE_NAME, as_store_error
from memory_backends.catalog.metadata import read_metadata
from memory_backends.catalog.records import COLUMNS, RecordSpan, from_record, unpack_crc32
from memory_backends.errors import EMTError, StoreError, StoreVersionError, refuse_link
from memory_backends.rows import files as row_files
from memory_backends.rows import query_samples as queries
from memory_backends.rows.append_files import layer_file_name
from memory_backends.rows.coding import RowCoding, record_bytes
from memory_backends.store.compaction import PARTIAL
from memory_backends.store.directory import INDEX_FOLDER, check_directory, check_generation

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
    except StoreVersionError:
        raise
    except StoreError as error:
        return [Damage(FILE_NAME, str(error))]
    with contextlib.ExitStack() as at_end:
        at_end.callback(catalog.close)
        reading = _Reading(directory, catalog, at_end)
        # Files are opened within the snapshot and read after it, so that no writer has to wait for
        # the reading, and none can compact away what is read.
        try:
            with catalog.snapshot():
                catalog.refresh()
                found = list(reading.catalog_damage())
                files = [*reading.row_files(), *reading.sample_files(), *reading.index_files()]
        except EMTError as error:  # SQLite could not even begin
            return [Damage(FILE_NAME, str(error))]
        found += reading.damage
        for file in files:
            found += _file_damage(file)
    return found


class _Part(NamedTuple):
    """Bytes of a file that have one checksum."""

    what: str
    first: int
    stop: int
    crc32: int


class _File(NamedTuple):
    """A file that is to be read."""

    name: str
    opened: BinaryIO
    parts: list[_Part]


class _Reading:
    """One reading of a store, within one snapshot of its catalogue.

    Attributes:
        damage: what the reading of file lists came across.
    """

    def __init__(self, directory: Path, catalog: Catalog, at_end: contextlib.ExitStack) -> None:
        self._directory = directory
        self._catalog = catalog
        self._connection = catalog.connection
        self._at_end = at_end
        self._spans: list[RecordSpan] = []  # of documents whose record is in order
        self.damage: list[Damage] = []

    # -- the catalogue --------------------------------------------------------------------------

    def catalog_damage(self) -> Iterator[Damage]:
        """Yield what is wrong with the catalogue."""
        checks = (
            self._database_damage,
            self._document_damage,
            self._span_damage,
            self._metadata_damage,
            self._state_damage,
        )
        for check in checks:
            try:
                with as_store_error(self._directory / FILE_NAME):
                    yield from check()
            except EMTError as error:
                yield Damage(FILE_NAME, str(error))

    def _database_damage(self) -> Iterator[Damage]:
        for (message,) in self._connection.execute("PRAGMA integrity_check"):
            if message != "ok":
                yield Damage(FILE_NAME, f"SQLite's integrity check says: {message}")
        schema.check_schema(self._connection)
        for (key,) in self._connection.execute("SELECT key FROM settings").fetchall():
            schema.read_setting(self._connection, str(key))

    def _document_damage(self) -> Iterator[Damage]:
        num_layers = len(self._catalog.layout.layers)
        query = f"SELECT {COLUMNS}, crc32 FROM documents ORDER BY first_row"
        for record in self._connection.execute(query):
            try:
                document = from_record(record, self._catalog.num_rows)
            except StoreError as error:
                yield Damage(FILE_NAME, str(error))
                continue
            row_crc32 = unpack_crc32(record[-2])
            if len(row_crc32) != num_layers:
                yield Damage(FILE_NAME, f"document '{document.name}' lacks checksums of its rows")
                continue
            first, stop = document.first_row, document.first_row + len(document.row_tokens)
            if self._spans and first < self._spans[-1].stop:
                yield Damage(FILE_NAME, f"document '{document.name}' has rows of another, too")
            self._spans.append(RecordSpan(document.name, first, stop, row_crc32))

    def _span_damage(self) -> Iterator[Damage]:
        committed = self._catalog.num_rows
        spans = [(span.first, span.stop) for span in self._spans]
        spans += schema.read_removed(self._connection)
        covered = schema.joined(sorted(spans))
        if covered != ([(0, committed)] if committed else []):
            yield Damage(
                FILE_NAME,
                f"each of the rows 0 to {committed - 1} must be a document's or removed; those "
                f"that are: {covered[:5]}",
            )

    def _metadata_damage(self) -> Iterator[Damage]:
        firsts = {first for (first,) in self._connection.execute("SELECT first_row FROM documents")}
        for first, _ in read_metadata(self._connection):
            if first not in firsts:
                yield Damage(FILE_NAME, f"there is metadata at row {first}, where no document is")

    def _state_damage(self) -> Iterator[Damage]:
        catalog = self._catalog
        coding = RowCoding(catalog.layout, catalog.row_codec, catalog.codec_state)
        for layer_idx in catalog.layout.layers:
            try:
                coding.coder(layer_idx)
            except StoreError as error:
                yield Damage(FILE_NAME, f"layer {layer_idx}: {error}")
        found = self._connection.execute("SELECT layer FROM codec_states")
        unknown = {layer_idx for (layer_idx,) in found} - set(coding.layers_with_state)
        if unknown:
            reason = f"codec '{catalog.row_codec}' has states of no layer: {sorted(unknown)[:5]}"
            yield Damage(FILE_NAME, reason)

    # -- the files ------------------------------------------------------------------------------

    def row_files(self) -> Iterator[_File]:
        """Yield the files of rows, with the parts that documents have."""
        sizes = record_bytes(self._catalog.layout, self._catalog.row_codec)
        self._find_extra_files(row_files.FOLDER)
        for at, layer_idx in enumerate(sorted(sizes)):
            size = sizes[layer_idx]
            parts = [
                _Part(
                    f"document '{span.name}'",
                    span.first * size,
                    span.stop * size,
                    span.row_crc32[at],
                )
                for span in self._spans
            ]
            name = f"{row_files.FOLDER}/{layer_file_name(layer_idx)}"
            yield from self._opened(name, self._catalog.num_rows * size, parts)

    def sample_files(self) -> Iterator[_File]:
        """Yield the files of query samples, with what each document added."""
        try:
            with as_store_error(self._directory / FILE_NAME):
                sampled = self._catalog.query_samples()
                segments = self._segments()
        except EMTError as error:
            self.damage.append(Damage(FILE_NAME, str(error)))
            return
        self._find_extra_files(queries.FOLDER)
        for layer_idx, layer in sampled.items():
            head_dim = self._catalog.layout.layers[layer_idx].head_dim
            size = layer.num_heads * head_dim * queries.ITEMSIZE
            parts, end = [], 0
            for first, count, crc32 in segments.get(layer_idx, []):
                if first != end:
                    break
                end = first + count
                what = f"samples {first} to {end - 1}"
                parts.append(_Part(what, first * size, end * size, crc32))
            if end != layer.num_samples:
                reason = f"sample {end} of layer {layer_idx} has no checksum"
                self.damage.append(Damage(FILE_NAME, reason))
            name = f"{queries.FOLDER}/{layer_file_name(layer_idx)}"
            yield from self._opened(name, layer.num_samples * size, parts)

    def index_files(self) -> Iterator[_File]:
        """Yield the FAISS files of the current generation."""
        try:
            saved = self._catalog.setting("index") or {}
            if not saved:
                return
            folder = f"{INDEX_FOLDER}/{check_generation(saved['generation'])}"
            files = {
                name: (int(expected["size"]), int(expected["crc32"]))
                for name, expected in saved["files"].items()
            }
        except EMTError as error:
            self.damage.append(Damage(FILE_NAME, str(error)))
            return
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            reason = f"the setting 'index' is damaged: it describes no files ({error})"
            self.damage.append(Damage(FILE_NAME, reason))
            return
        for name, (size, crc32) in files.items():
            if Path(name).name != name or name in (".", ".."):
                reason = f"an index file must lie in its folder; got {name!r:.80}"
                self.damage.append(Damage(FILE_NAME, reason))
                continue
            parts = [_Part("the file", 0, size, crc32)]
            yield from self._opened(f"{folder}/{name}", size, parts, is_whole=True)

    def _segments(self) -> dict[int, list[tuple[int, int, int]]]:
        """Return layer -> (first sample, samples, crc32) of each document that added some."""
        found: dict[int, list[tuple[int, int, int]]] = {}
        query = "SELECT * FROM query_samples ORDER BY layer, first_sample"
        for layer_idx, *numbers in self._connection.execute(query):
            first, count, crc32 = numbers
            if not all(type(number) is int for number in numbers) or first < 0 or count < 1:
                raise StoreError(f"the record of samples of layer {layer_idx} is damaged.")
            found.setdefault(layer_idx, []).append((first, count, crc32))
        return found

    def _opened(
        self, name: str, size: int, parts: list[_Part], *, is_whole: bool = False
    ) -> Iterator[_File]:
        """Open a file that must have `size` bytes; more, too, unless `is_whole`."""
        if not size:
            return
        path = self._directory / name
        try:
            refuse_link(path.parent)
            refuse_link(path)
            opened = self._at_end.enter_context(path.open("rb"))
            found = path.stat().st_size
        except OSError as error:
            self.damage.append(Damage(name, f"cannot be read: {error.strerror or error}"))
            return
        if found < size or (is_whole and found != size):
            self.damage.append(Damage(name, f"has {found} bytes; expected {size}"))
        yield _File(name, opened, parts)

    def _find_extra_files(self, folder: str) -> None:
        known = {layer_file_name(layer_idx) for layer_idx in self._catalog.layout.layers}
        if not (self._directory / folder).is_dir():
            return
        for path in sorted((self._directory / folder).iterdir()):
            if path.name not in known and not path.name.endswith(PARTIAL):
                self.damage.append(Damage(f"{folder}/{path.name}", "is not part of the store"))


def _file_damage(file: _File) -> Iterator[Damage]:
    """Compare the parts of a file with their checksums."""
    try:
        for part in file.parts:
            file.opened.seek(part.first)
            if _crc32(file.opened, part.stop - part.first) != part.crc32:
                yield Damage(file.name, f"{part.what}: the checksum does not match")
    except OSError as error:
        yield Damage(file.name, f"cannot be read: {error.strerror or error}")


def _crc32(file: BinaryIO, num_bytes: int) -> int:
    """Return the crc32 of the next bytes of a file, as many of them as there are."""
    crc32 = 0
    while num_bytes > 0 and (data := file.read(min(num_bytes, _BYTES_AT_ONCE))):
        crc32 = zlib.crc32(data, crc32)
        num_bytes -= len(data)
    return crc32
