"""Stores without the permission to write, for tests: even for the superuser, who may do all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import filelock
import pytest


def forbid_writing(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    """Let one store not be written until `monkeypatch` is undone."""
    may, acquire = os.access, filelock.FileLock.acquire

    def access(path: Any, mode: int, **options: Any) -> bool:
        is_denied = bool(mode & os.W_OK) and Path(path).is_relative_to(store)
        return not is_denied and may(path, mode, **options)

    def refuse(lock: filelock.FileLock, *args: Any, **options: Any) -> Any:
        if Path(lock.lock_file).is_relative_to(store):
            raise PermissionError(errno.EACCES, "Permission denied")
        return acquire(lock, *args, **options)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
