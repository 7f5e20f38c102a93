"""The errors a backend raises.

EMTError
├── MemoryMismatchError   ValueError           rows, a document or a store of another shape or model
├── DocumentError         ValueError           a document that is already there, or is not there
├── IndexFactoryError     ValueError           a FAISS factory string that cannot be used
└── StoreError            OSError              a store directory that is damaged, locked or full
    ├── StoreLockedError                       a store that somebody else is writing to
    ├── StoreVersionError                      a store of another format version
    └── StoreReplacedError                     a store that is not the one that was opened any more

`emt.errors` shows the whole tree, with the errors of the other package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class EMTError(Exception):
    """Anything emt refuses to do."""


class MemoryMismatchError(EMTError, ValueError):
    """Rows or a store that do not fit this memory or this model."""


class DocumentError(EMTError, ValueError):
    """A document name that is taken, unknown or unusable."""


class IndexFactoryError(EMTError, ValueError):
    """A FAISS factory string that FAISS rejects or that cannot serve a memory."""


class StoreError(EMTError, OSError):
    """A store directory that cannot be read or written."""


class StoreLockedError(StoreError):
    """A store that another process, or another thread, is writing to."""


class StoreVersionError(StoreError):
    """A store of a format version that this emt does not read."""


class StoreReplacedError(StoreError):
    """A store that was removed, or replaced by another one, since it was opened."""


@contextlib.contextmanager
def reported(path: Path | None) -> Iterator[None]:
    """Turn a full disk or a read-only directory into a StoreError that names the store."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"the store at '{path}' cannot be written: {error.strerror or error}. What was stored "
            "before is untouched; make room or correct the permissions, and run again."
        ) from error


def refuse_link(path: Path) -> None:
    """Raise a StoreError for a part of a store that is a symbolic link: it could lead anywhere."""
    if path.is_symlink():
        raise StoreError(
            f"expected '{path}' to be in its store; it is a symbolic link. "
            "Put the file itself there, or link to the store as a whole."
        )
