"""Files that a store's owner derives from its rows, such as means of them, beside the store's own.

Such a file is written whole or not at all, and a damaged one is as good as none: whoever wants it
derives it again. So the catalogue does not know it, and `verify` need not read it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

from memory_backends.rows.append_files import sync_path

_SUFFIX = ".derived"
_PARTIAL = ".partial"
_CRC_BYTES = 4


def read_derived(directory: Path, name: str) -> memoryview | None:
    """Return what a file has; None if it is not there, a symbolic link, or damaged."""
    path = directory / (name + _SUFFIX)
    if path.is_symlink():  # it could lead anywhere
        return None
    try:
        data = memoryview(path.read_bytes())
    except OSError:
        return None
    body, crc32 = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    return body if zlib.crc32(body).to_bytes(_CRC_BYTES, "little") == crc32 else None


def write_derived(directory: Path, name: str, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file in the place of the one before; nobody else may be writing to the store."""
    path = directory / (name + _SUFFIX)
    partial = path.with_name(path.name + _PARTIAL)
    partial.unlink(missing_ok=True)  # left by a killed run, or a symbolic link
    crc32 = 0
    try:
        with partial.open("xb") as file:
            for part in parts:
                crc32 = zlib.crc32(part, crc32)
                file.write(part)
            file.write(crc32.to_bytes(_CRC_BYTES, "little"))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_path(directory)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def copy_derived(directory: Path, target: Path) -> None:
    """Copy all such files to a copy of the store; those that cannot be read are left out."""
    for path in directory.glob("*" + _SUFFIX):
        with contextlib.suppress(OSError):
            if not path.is_symlink():
                shutil.copyfile(path, target / path.name)


def remove_derived(directory: Path) -> None:
    """Delete all such files: they may tell of documents that were removed."""
    for pattern in ("*" + _SUFFIX, "*" + _SUFFIX + _PARTIAL):
        for path in directory.glob(pattern):
            path.unlink()
