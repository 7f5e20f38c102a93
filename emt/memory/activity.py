"""Who is using a memory right now: many may generate, one may write, never both."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from emt.errors import MemoryUseError


class Activity:
    """Refuses what cannot happen at the same time, instead of waiting for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generating = 0
        self._alone: str | None = None

    @contextlib.contextmanager
    def shared(self, action: str) -> Iterator[None]:
        """Run something that reads the memory.

        Raises:
            MemoryUseError: the memory is being changed.
        """
        with self._lock:
            if self._alone is not None:
                raise MemoryUseError(
                    f"cannot {action} while the memory is busy with {self._alone}(). "
                    "Wait for it to return."
                )
            self._generating += 1
        try:
            yield
        finally:
            with self._lock:
                self._generating -= 1

    @contextlib.contextmanager
    def alone(self, action: str) -> Iterator[None]:
        """Run something that changes the memory.

        Raises:
            MemoryUseError: the model is generating, or the memory is being changed.
        """
        with self._lock:
            if self._generating or self._alone is not None:
                busy = f"{self._alone}() is running" if self._alone else "the model is generating"
                raise MemoryUseError(f"cannot {action} while {busy}. Wait for it to return.")
            self._alone = action
        try:
            yield
        finally:
            with self._lock:
                self._alone = None
