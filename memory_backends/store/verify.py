"""Reading a whole store and naming every file of it that is damaged.

Opening a store compares sizes and the checksums of what it reads; `verify` reads everything, in
parts of a few megabytes. Bytes past the committed end of a file, and rows that no document has any
more, are nobody's: they are not damage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from memory_backends.catalog import FILE_NAME, Catalog
from memory_backends.catalog.database import as_store_error
from memory_backends.catalog.records import RecordSpan
from memory_backends.errors import EMTError, StoreError, StoreVersionError, refuse_link
from memory_backends.rows import files, query_samples
from memory_backends.rows.append_files import CODED, FIRST, layer_file_name, next_crc32
from memory_backends.rows.coding import RowCoding, record_bytes
from memory_backends.store.catalog_check import CatalogCheck
from memory_backends.store.compaction import PARTIAL
from memory_backends.store.directory import (
    INDEX_FOLDER,
    check_directory,
    check_generation,
    is_sharded,
)


class Damage(NamedTuple):
    """What is wrong with one file, by its path in the store with "/" between the parts."""

    file: str
    reason: str


class _Part(NamedTuple):
    """Bytes of a file that have one checksum."""

    name: str
    first: int
    stop: int
    crc32: int


class _File(NamedTuple):
    """A file that is to be read."""

    name: str
    opened: BinaryIO
    parts: list[_Part]


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
        # Files are opened within the snapshot and read after it, so that no writer has to wait for
        # the reading, and none can compact away what is read.
        try:
            with catalog.snapshot():
                catalog.refresh()
                check = CatalogCheck(catalog)
                reading = _Reading(directory, catalog, at_end)
                opened = [
                    *([] if is_sharded(directory) else reading.row_files(check.spans)),
                    *reading.sample_files(),
                    *reading.index_files(),
                ]
        except EMTError as error:  # SQLite could not even begin
            return [Damage(FILE_NAME, str(error))]
        damage = [Damage(FILE_NAME, reason) for reason in check.reasons] + reading.damage
        for file in opened:
            damage += _damage_of(file)
    return damage


class _Reading:
    """The files that a catalogue names, opened within one snapshot of it.

    `damage` is what was wrong with the files' records, sizes and names.
    """

    def __init__(self, directory: Path, catalog: Catalog, at_end: contextlib.ExitStack) -> None:
        self._directory = directory
        self._catalog = catalog
        self._at_end = at_end
        self.damage: list[Damage] = []

    def row_files(self, spans: list[RecordSpan]) -> Iterator[_File]:
        """Yield the files of rows, with the parts that documents have."""
        self._find_extra_files(files.FOLDER)
        catalog, codec, kind = self._catalog, self._catalog.row_codec, CODED
        if RowCoding(catalog.layout, codec, has_states=catalog.has_codec_states).must_learn:
            codec, kind = "exact", FIRST
        fine_heads = None if kind == FIRST else catalog.fine_heads
        sizes = record_bytes(catalog.layout, codec, fine_heads)
        for at, (layer_idx, size) in enumerate(sorted(sizes.items())):
            parts = [
                _Part(f"document '{name}'", first * size, stop * size, row_crc32[at])
                for name, first, stop, row_crc32 in spans
            ]
            name = f"{files.FOLDER}/{layer_file_name(layer_idx, kind)}"
            yield from self._opened(name, self._catalog.num_rows * size, parts)

    def sample_files(self) -> Iterator[_File]:
        """Yield the files of query samples, with what each document added."""
        try:
            with as_store_error(self._directory / FILE_NAME):
                sampled = self._catalog.query_samples()
                segments = self._segments()
        except EMTError as error:
            self._blame_catalog(str(error))
            return
        self._find_extra_files(query_samples.FOLDER)
        for layer_idx, layer in sampled.items():
            head_dim = self._catalog.layout.layers[layer_idx].head_dim
            size = layer.num_heads * head_dim * query_samples.ITEMSIZE
            parts, end = [], 0
            for first, count, crc32 in segments.get(layer_idx, []):
                if first != end:
                    break
                end = first + count
                parts.append(
                    _Part(f"samples {first} to {end - 1}", first * size, end * size, crc32)
                )
            if end != layer.num_samples:
                self._blame_catalog(f"sample {end} of layer {layer_idx} has no checksum")
            name = f"{query_samples.FOLDER}/{layer_file_name(layer_idx)}"
            yield from self._opened(name, layer.num_samples * size, parts)

    def index_files(self) -> Iterator[_File]:
        """Yield the index files of the generation in force."""
        try:
            setting = self._catalog.setting("index") or {}
            if not setting:
                return
            folder = f"{INDEX_FOLDER}/{check_generation(setting['generation'])}"
            expected = {
                name: (int(file["size"]), int(file["crc32"]))
                for name, file in setting["files"].items()
            }
        except EMTError as error:
            self._blame_catalog(str(error))
            return
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            self._blame_catalog(f"the setting 'index' is damaged: it describes no files ({error})")
            return
        for name, (size, crc32) in expected.items():
            if Path(name).name != name or name in (".", ".."):
                self._blame_catalog(f"an index file must lie in its folder; got {name!r:.80}")
                continue
            parts = [_Part("the file", 0, size, crc32)]
            yield from self._opened(f"{folder}/{name}", size, parts, is_whole=True)

    def _segments(self) -> dict[int, list[tuple[int, int, int]]]:
        """Return layer -> (first sample, samples, crc32) of each document that added some."""
        segments: dict[int, list[tuple[int, int, int]]] = {}
        query = "SELECT * FROM query_samples ORDER BY layer, first_sample"
        for layer_idx, *numbers in self._catalog.connection.execute(query):
            first, count, crc32 = numbers
            if not all(type(number) is int for number in numbers) or first < 0 or count < 1:
                raise StoreError(f"the record of samples of layer {layer_idx} is damaged.")
            segments.setdefault(layer_idx, []).append((first, count, crc32))
        return segments

    def _opened(
        self, name: str, size: int, parts: list[_Part], *, is_whole: bool = False
    ) -> Iterator[_File]:
        """Open a file that must have `size` bytes; it may have more, unless `is_whole`."""
        if not size:
            return
        path = self._directory / name
        try:
            refuse_link(path.parent)
            refuse_link(path)
            opened = self._at_end.enter_context(path.open("rb"))
            actual = path.stat().st_size
        except OSError as error:
            self.damage.append(Damage(name, f"cannot be read: {error.strerror or error}"))
            return
        if actual < size or (is_whole and actual != size):
            self.damage.append(Damage(name, f"has {actual} bytes; expected {size}"))
        yield _File(name, opened, parts)

    def _find_extra_files(self, folder: str) -> None:
        names = {
            layer_file_name(layer_idx, kind)
            for layer_idx in self._catalog.layout.layers
            for kind in (CODED, FIRST)
        }
        if not (self._directory / folder).is_dir():
            return
        for path in sorted((self._directory / folder).iterdir()):
            if path.name not in names and not path.name.endswith(PARTIAL):
                self.damage.append(Damage(f"{folder}/{path.name}", "is not part of the store"))

    def _blame_catalog(self, reason: str) -> None:
        self.damage.append(Damage(FILE_NAME, reason))


def _damage_of(file: _File) -> Iterator[Damage]:
    """Compare the parts of a file with their checksums."""
    try:
        for part in file.parts:
            file.opened.seek(part.first)
            if next_crc32(file.opened, part.stop - part.first) != part.crc32:
                yield Damage(file.name, f"{part.name}: the checksum does not match")
    except OSError as error:
        yield Damage(file.name, f"cannot be read: {error.strerror or error}")
