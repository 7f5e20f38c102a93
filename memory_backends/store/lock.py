"""One writer at a time, whose name others are told.

The lock is the operating system's, on the file `write.lock`, so it ends with its process. Its owner
writes `writer.json` beside it; that is read only while the lock is held, and not believed if the
process that it names is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import filelock

from memory_backends.errors import StoreLockedError, refuse_link

LOCK_FILE_NAME = "write.lock"
OWNER_FILE_NAME = "writer.json"

_LONGEST_COMMAND = 200  # characters that an error shows
_LONGEST_FILE = 4096


@contextlib.contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Hold the write lock of the store at `path`; a StoreLockedError names who has it."""
    refuse_link(path / LOCK_FILE_NAME)
    # An iterator that writes may be closed by another thread than began it.
    lock = filelock.FileLock(path / LOCK_FILE_NAME, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise StoreLockedError(_refusal(path)) from None
    with contextlib.ExitStack() as at_end:
        at_end.callback(lock.release)
        at_end.callback(_remove_owner, path)
        with contextlib.suppress(OSError):  # a full disk must not keep anyone from removing rows
            _write_owner(path)
        yield


def _write_owner(path: Path) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.orig_argv)[:_LONGEST_COMMAND],
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    partial = path / (OWNER_FILE_NAME + ".partial")
    partial.unlink(missing_ok=True)  # it may be a link, too
    partial.write_text(json.dumps(owner), encoding="utf-8")
    partial.replace(path / OWNER_FILE_NAME)


def _remove_owner(path: Path) -> None:
    with contextlib.suppress(OSError):
        (path / OWNER_FILE_NAME).unlink()


def _refusal(path: Path) -> str:
    unnamed = f"another process is writing to '{path}'; wait for it, or stop it."
    try:
        with (path / OWNER_FILE_NAME).open("rb") as file:
            owner = json.loads(file.read(_LONGEST_FILE))
        pid, host = int(owner["pid"]), _printable(owner["host"])
        command, since = _printable(owner["command"]), _printable(owner["since"])
        is_here = host == socket.gethostname()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return unnamed
    if is_here and pid == os.getpid():
        return f"this process is writing to '{path}' already, since {since}. Let that end first."
    if is_here and not _is_alive(pid):  # the file is left over; the new owner has not named itself
        return unnamed
    return (
        f"another process is writing to '{path}': PID {pid} ({command}) on {host} since {since}; "
        "wait for it, or stop it."
    )


def _printable(value: object) -> str:
    text = str(value)[:_LONGEST_COMMAND]
    return "".join(character if character.isprintable() else " " for character in text)


def _is_alive(pid: int) -> bool:
    if os.name != "posix" or pid <= 0:
        return pid > 0
    try:
        with contextlib.suppress(PermissionError, OverflowError):
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
