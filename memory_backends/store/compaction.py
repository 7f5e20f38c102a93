"""Giving the space of removed documents back.

A row's position is its id, so rows never move. A layer's file is written anew with holes where no
document is (a sparse file: holes read as zeros and take no space), forced to the disk, and put in
the place of the old one. All committed rows have the same bytes in both, so the store is valid at
every instant. Readers that have the old file mapped keep it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from memory_backends.rows.append_files import FIRST, AppendFile, sync_path
from memory_backends.rows.files import FOLDER, RowFiles
from memory_backends.scope import joined
from memory_backends.store.derived import remove_derived
from memory_backends.store.store import Store

PARTIAL = ".partial"

_BYTES_AT_ONCE = 2**22


def compact(store: Store) -> int:
    """Make holes of the rows that no document has; return the bytes given back.

    Nobody else may be writing to the store, which is as good as before if the disk is full.
    """
    rows, catalog = store.rows, store.catalog
    assert isinstance(rows, RowFiles)
    assert catalog.path is not None
    folder = catalog.path.parent / FOLDER
    before = _disk_bytes([catalog.path, *folder.glob("*")])
    leftovers = [
        *folder.glob(f"*{PARTIAL}"),
        *(folder.glob(f"{FIRST}-*") if rows.is_learned else ()),
    ]
    for leftover in leftovers:
        leftover.unlink()
    live = joined((span.first, span.stop) for span in catalog.record_spans())
    for layer_idx in store.layout.layers:
        _rewrite(rows.files[layer_idx], live)
    catalog.vacuum()
    remove_derived(folder.parent)
    rows.show(catalog.num_rows, anew=True)
    return max(before - _disk_bytes([catalog.path, *folder.glob("*")]), 0)


def _rewrite(file: AppendFile, live: Iterable[tuple[int, int]]) -> None:
    """Write a file anew with its `live` records, (first, stop) ascending, and holes for others."""
    if not file.num_records or not file.record_bytes:
        return
    size = file.record_bytes
    partial = file.path.with_name(file.path.name + PARTIAL)
    try:
        with file.path.open("rb") as source, partial.open("wb") as target:
            target.truncate(file.num_records * size)
            for first, stop in live:
                source.seek(first * size)
                target.seek(first * size)
                rest = (stop - first) * size
                while rest:
                    data = source.read(min(rest, _BYTES_AT_ONCE))
                    if not data:
                        raise OSError(errno.EIO, f"'{file.path}' ends too early")
                    target.write(data)
                    rest -= len(data)
            target.flush()
            os.fsync(target.fileno())
        partial.replace(file.path)
        sync_path(file.path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _disk_bytes(paths: Iterable[Path]) -> int:
    """Return the space that files take, which is less than their size if they have holes."""
    statuses = (path.stat() for path in paths if path.is_file())
    return sum(
        status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
        for status in statuses
    )
