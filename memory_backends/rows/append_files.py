"""Append-only files of records of a fixed size: one file a layer, mapped read-only.

A committed record never moves. `append` writes after the committed ones, where no reader looks;
`seal` ends a unit (a document) and tells its checksum; `rewind` drops what was appended after the
last seal; `flush` makes everything durable. Then the catalogue commits or does not, and `show`
maps as many records as it says, and cuts off the others. A crash before the commit leaves bytes
past the committed end, which the next append overwrites.

A reader keeps the files it has mapped when compaction puts others in their place.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
import numpy as np

from memory_backends.errors import StoreError, refuse_link

CODED, FIRST = "layer", "first"  # how the names of a layer's files begin

_BYTES_AT_ONCE = 2**22


class AppendFile:
    """One file of records of `record_bytes`, which the first `append` makes.

    Attributes:
        num_records: how many records are committed.
        records: (num_records, record_bytes) uint8, mapped. Nothing may write to them.

    Raises:
        StoreError: the file is missing or shorter than `num_records` records.
    """

    def __init__(self, path: Path, record_bytes: int, num_records: int) -> None:
        self.path = path
        self.record_bytes = record_bytes
        self.is_new = False  # made since the last `flush`
        self.num_records = num_records
        self._file: FileIO | None = None
        self._end = self._sealed = num_records * record_bytes
        self._crc32 = 0
        self.records = self._mapped()

    def append(self, data: bytes | memoryview) -> None:
        """Put whole records after everything appended so far; they reach the disk at `flush`."""
        if not self.record_bytes:  # there is no file
            return
        file = self._opened()
        rest = memoryview(data).cast("B")
        self._crc32 = zlib.crc32(rest, self._crc32)
        self._end += rest.nbytes
        while rest:
            rest = rest[file.write(rest) :]

    def skip(self, num_records: int) -> None:
        """Leave room for records that nobody reads, without taking space on the disk."""
        if not self.record_bytes:
            return
        file = self._opened()
        self._end += num_records * self.record_bytes
        file.truncate(self._end)
        file.seek(self._end)

    def seal(self) -> int:
        """Return the crc32 of what was appended since the last seal."""
        crc32, self._crc32, self._sealed = self._crc32, 0, self._end
        return crc32

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""
        self._crc32, self._end = 0, self._sealed
        if self._file is not None:
            self._file.truncate(self._end)
            self._file.seek(self._end)

    def flush(self) -> None:
        """Force what was appended to the disk; a new file's name is for the caller to force."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def show(self, num_records: int, *, anew: bool = False) -> None:
        """Show the first `num_records` records; cut off what was appended after them.

        With `anew`, map the file that has the name now, which may be another one.
        """
        if self._file is not None:
            with contextlib.suppress(OSError):  # no reader looks there; the next append cuts it off
                self._file.truncate(num_records * self.record_bytes)
            with contextlib.suppress(OSError):  # a full disk was reported by `append` or `flush`
                self._file.close()
            self._file = None
        anew = anew or num_records != self.num_records
        self.num_records = num_records
        self._end = self._sealed = num_records * self.record_bytes
        self._crc32 = 0
        if anew:
            self.records = self._mapped()

    def close(self) -> None:
        """Let go of the file; tensors handed out stay valid."""
        self.show(self.num_records)
        self.num_records = self._end = self._sealed = 0
        self.records = self._mapped()

    def _opened(self) -> FileIO:
        if self._file is None:
            self._check_size()
            if not self.path.exists():
                self.path.parent.mkdir(exist_ok=True)
                self.path.touch()
            self.is_new = self.is_new or not self.num_records  # or made by a run that failed
            self._file = self.path.open("r+b", buffering=0)  # keeps nothing that was not written
            self._file.truncate(self._end)  # what an interrupted write left behind
            self._file.seek(self._end)
        return self._file

    def _mapped(self) -> torch.Tensor:
        shape = (self.num_records, self.record_bytes)
        if not self.num_records or not self.record_bytes:
            return torch.empty(shape, dtype=torch.uint8)
        self._check_size()
        try:
            with self.path.open("rb") as file:
                view = mmap.mmap(file.fileno(), self._end, access=mmap.ACCESS_READ)
        except OSError as error:
            raise StoreError(
                f"'{self.path}' cannot be read: {error.strerror or error}. Check its permissions."
            ) from error
        with warnings.catch_warnings():  # torch has no read-only tensors; nothing writes to this
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(np.frombuffer(view, dtype=np.uint8)).view(shape)

    def _check_size(self) -> None:
        refuse_link(self.path.parent)
        refuse_link(self.path)
        expected = self.num_records * self.record_bytes
        size = self.path.stat().st_size if self.path.is_file() else None
        if expected and (size is None or size < expected):
            state = "is missing" if size is None else f"is truncated to {size} bytes"
            raise StoreError(
                f"'{self.path}' {state}; expected at least {expected} bytes for "
                f"{self.num_records} rows. "
                "Restore the file from a copy, or index the documents again."
            )


class AppendFiles(dict[int, AppendFile]):
    """A folder, made with its first file, with one `AppendFile` a layer. Maps layers to files.

    `record_bytes` are by layer, and `num_records`, how many are committed: 0 for others. `kind` is
    how the files' names begin.
    """

    def __init__(
        self,
        folder: Path,
        record_bytes: Mapping[int, int],
        num_records: Mapping[int, int],
        kind: str = CODED,
    ) -> None:
        super().__init__()
        self.folder = folder
        self._kind = kind
        for layer_idx, size in record_bytes.items():
            self.add_layer(layer_idx, size, num_records.get(layer_idx, 0))

    def add_layer(self, layer_idx: int, record_bytes: int, num_records: int) -> None:
        """Have a file for one more layer; errors as for the class."""
        path = self.folder / layer_file_name(layer_idx, self._kind)
        self[layer_idx] = AppendFile(path, record_bytes, num_records)

    def seal(self) -> dict[int, int]:
        """Return layer -> crc32 of what was appended since the last seal."""
        return {layer_idx: file.seal() for layer_idx, file in self.items()}

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""
        for file in self.values():
            file.rewind()

    def flush(self) -> None:
        """Force everything appended to the disk, the names of new files too."""
        for file in self.values():
            file.flush()
        if any(file.is_new for file in self.values()):
            sync_path(self.folder)
            sync_path(self.folder.parent)
            for file in self.values():
                file.is_new = False

    def show(self, num_records: Mapping[int, int], *, anew: bool = False) -> None:
        """Show the first records of each layer; see `AppendFile.show`."""
        for layer_idx, file in self.items():
            file.show(num_records.get(layer_idx, 0), anew=anew)

    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""
        for file in self.values():
            file.close()

    def remove(self) -> None:
        """Delete the files, which nobody needs any more, where the system lets us."""
        self.close()
        for file in self.values():
            with contextlib.suppress(OSError):
                file.path.unlink()


def layer_file_name(layer_idx: int, kind: str = CODED) -> str:
    """Return the name of a layer's file."""
    return f"{kind}-{layer_idx:03d}.bin"


def sync_path(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def next_crc32(file: BinaryIO, num_bytes: int) -> int:
    """Return the crc32 of the next bytes of a file, as many of them as there are."""
    crc32 = 0
    while num_bytes > 0 and (data := file.read(min(num_bytes, _BYTES_AT_ONCE))):
        crc32 = zlib.crc32(data, crc32)
        num_bytes -= len(data)
    return crc32
