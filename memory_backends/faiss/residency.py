"""A bound on the resident memory of mapped files.

Pages of a mapped file become resident when they are read, so a process that serves a store of many
gigabytes seems to take them all. `ResidentLimit` lets go of them when they are too many. They stay
in the system's page cache: reading one again costs a page fault, not a read from the disk.

Linux only, by /proc and madvise; elsewhere the system alone decides.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

_ROWS_TO_LOOK = 1024  # read since the last look; the system makes up to 64 kB resident with each
_DONT_NEED = 4  # MADV_DONTNEED
_STATM = Path("/proc/self/statm")


class ResidentLimit:
    """Keep the resident file pages of this process near what they were, plus a number of bytes.

    Args:
        num_bytes: how much the file pages may grow before the maps let go of theirs.
        maps: gives address and bytes of every map that may, each starting at a page.
    """

    def __init__(self, num_bytes: int, maps: Callable[[], Iterable[tuple[int, int]]]) -> None:
        self._num_bytes = num_bytes
        self._maps = maps
        self._rows = 0
        self._before = file_bytes()

    def count(self, num_rows: int) -> None:
        """Take notice of rows that were read, and let go of pages if there are too many by now."""
        self._rows += num_rows
        if self._rows >= _ROWS_TO_LOOK:
            self._rows = 0
            if file_bytes() - self._before > self._num_bytes:
                self.release()

    def release(self) -> None:
        """Let go of all maps' pages."""
        libc = ctypes.CDLL(None)
        for address, num_bytes in self._maps():
            if num_bytes:
                libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _DONT_NEED)
        self._before = file_bytes()


def file_bytes() -> int:
    """Return the resident bytes of this process that are pages of files; 0 where unknown."""
    if not sys.platform.startswith("linux"):
        return 0
    shared = int(_STATM.read_text(encoding="ascii").split()[2])
    return shared * os.sysconf("SC_PAGE_SIZE")
