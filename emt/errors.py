"""Every error emt raises on purpose. Each is also the builtin that fits.

EMTError
├── ConfigError            ValueError           a setting unknown, of a wrong type or out of range
├── UnsupportedModelError  NotImplementedError  a model whose attention cannot be reached
├── MemoryUseError         RuntimeError         attached twice, writing while generating
├── CorpusError            ValueError           a document that cannot be read
├── MemoryMismatchError    ValueError           rows or a store of another shape or model
├── DocumentError          ValueError           a document name taken, unknown or unusable
├── IndexFactoryError      ValueError           a FAISS factory string that cannot be used
└── StoreError             OSError              a store directory damaged, locked or full
"""

from collections.abc import Sequence

from memory_backends.errors import (
    DocumentError,
    EMTError,
    IndexFactoryError,
    MemoryMismatchError,
    StoreError,
)

__all__ = [
    "ConfigError",
    "CorpusError",
    "DocumentError",
    "EMTError",
    "IndexFactoryError",
    "MemoryMismatchError",
    "MemoryUseError",
    "StoreError",
    "UnsupportedModelError",
]


class ConfigError(EMTError, ValueError):
    """A setting that is unknown, of a wrong type or out of range."""


class UnsupportedModelError(EMTError, NotImplementedError):
    """A model whose attention emt cannot reach, or keys it cannot bring back to position 0."""


class MemoryUseError(EMTError, RuntimeError):
    """A call at the wrong time: attached twice, not attached, writing while generating."""


class CorpusError(EMTError, ValueError):
    """A file or folder that is not the documents it should be.

    Attributes:
        errors: one for each bad file or line, where there are several.
    """

    def __init__(self, message: str, errors: Sequence[EMTError] = ()) -> None:
        super().__init__(message)
        self.errors = tuple(errors)
