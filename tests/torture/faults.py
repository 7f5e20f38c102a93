"""Make a process die, or its writes fail, at a chosen step.

A *step* is anything that changes the disk or is about to: opening a file of the store to write,
a write, a truncation, a sync, a rename, a removal, a statement or a commit of SQLite. Counting
them makes every moment between two steps a moment to die at.

What is written inside a library (FAISS, SQLite) makes no step; there a limit on the size of files
does it, which the kernel watches to the byte: the write that crosses it fails after having written
up to there, or kills.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from tests.torture.durability import Durability

Kind = Literal[
    "count",  # nothing fails; the last line said is the number of steps, after what is not synced
    "kill",  # SIGKILL before the step
    "Ctrl-C at",  # KeyboardInterrupt as soon as the step is done
    "once",  # this step fails with EIO, those after it do not
    "full",  # from this step on, all but removing fails with ENOSPC
    "limit",  # writing past this many bytes of a file fails
    "kill at limit",  # writing past this many bytes of a file kills
]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_REMOVING = {"os.remove", "os.rmdir", "shutil.rmtree"}
_EVENTS = {"os.mkdir", "os.rename", "os.link", "os.truncate"} | _REMOVING


class Fault(NamedTuple):
    """What goes wrong in a child, and when.

    Attributes:
        kind: see `Kind`.
        at: the step, from 1; or the bytes of the limit.
        folder: only files below it make steps.
    """

    kind: Kind
    at: int
    folder: str

    def install(self) -> None:
        """Let it happen in this process, which is of no use for anything else afterwards."""
        if self.kind in ("limit", "kill at limit"):
            dies = self.kind == "kill at limit"
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, self.at))
        else:
            _install(_Steps(self))


class _Steps:
    """Counts steps and does what the fault says."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.taken = 0
        self.durability = Durability(fault.folder, _say) if fault.kind == "count" else None

    def commit(self) -> int:
        """Count the step that is a commit."""
        if self.durability is not None:
            self.durability.check_commit()
        return self.take()

    def take(self, *, removing: bool = False) -> int:
        """Count a step; return the errno it is to fail with, or 0."""
        self.taken += 1
        kind, at, _ = self.fault
        if kind == "kill" and self.taken == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "once" and self.taken == at:
            return errno.EIO
        if kind == "full" and self.taken >= at and not removing:
            return errno.ENOSPC
        return 0

    def done(self) -> None:
        """Be interrupted after the step that was counted last, if it is the one."""
        if self.fault.kind == "Ctrl-C at" and self.taken == self.fault.at:
            self.taken += 1
            raise KeyboardInterrupt

    def take_or_raise(self, *, removing: bool = False) -> None:
        number = self.take(removing=removing)
        if number:
            raise OSError(number, os.strerror(number))


def _install(steps: _Steps) -> None:
    folder = steps.fault.folder

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not (flags or 0) & _WRITING:
                return
        elif event in _EVENTS:
            path = arguments[0]
            if event == "os.rename" and steps.durability is not None:
                steps.durability.renamed(os.fsdecode(arguments[1]))
        else:
            return
        if isinstance(path, int) or os.fsdecode(path).startswith(folder):
            steps.take_or_raise(removing=event in _REMOVING)
            steps.done()  # before it, in fact: nothing here knows when it is over

    sys.addaudithook(hook)
    for name in ("fsync", "fdatasync", "write", "pwrite", "posix_fallocate"):
        setattr(os, name, _counted(steps, getattr(os, name)))
    _wrap_files(steps, folder)
    _wrap_sqlite(steps)
    if steps.durability is not None:
        _watch(steps, steps.durability)


def _watch(steps: _Steps, durability: Durability) -> None:
    """Note what is synced, and tell at the end how many steps there were."""
    sync, exit_now = os.fsync, os._exit

    def synced(file: Any) -> None:
        sync(file)
        durability.fsync(file if isinstance(file, int) else file.fileno())

    def told(code: int) -> NoReturn:
        durability.check_end()
        _say(f"steps {steps.taken}")
        exit_now(code)

    os.fsync, os._exit = synced, told


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _counted(steps: _Steps, function: Any) -> Any:
    def counted(*arguments: Any) -> Any:
        steps.take_or_raise()
        result = function(*arguments)
        steps.done()
        return result

    return counted


class _File:
    """A binary file whose every write is a step."""

    def __init__(self, file: Any, steps: _Steps) -> None:
        self._file, self._steps = file, steps

    def write(self, data: Any) -> int:
        self._steps.take_or_raise()
        written = int(self._file.write(data))
        self._steps.done()
        return written

    def flush(self) -> None:
        self._steps.take_or_raise()
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _wrap_files(steps: _Steps, folder: str) -> None:
    open_file = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        result = open_file(file, mode, *arguments, **options)
        ours = isinstance(file, str | Path) and str(file).startswith(folder)
        return _File(result, steps) if ours and "b" in mode and set(mode) & set("wax+") else result

    io.open = opened  # what `pathlib` calls


def _wrap_sqlite(steps: _Steps) -> None:
    def step(*, commits: bool = False) -> None:
        if steps.commit() if commits else steps.take():
            raise sqlite3.OperationalError("database or disk is full")

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            word = statement.lstrip().partition(" ")[0].upper()
            if word not in ("SELECT", "PRAGMA"):
                step(commits=word in ("COMMIT", "END", "VACUUM"))
            cursor = super().execute(statement, *arguments)
            steps.done()
            return cursor

        def executemany(self, *arguments: Any) -> sqlite3.Cursor:
            step()
            return super().executemany(*arguments)

        def commit(self) -> None:
            step(commits=True)
            super().commit()
            steps.done()

        def backup(self, *arguments: Any, **options: Any) -> None:
            step()
            super().backup(*arguments, **options)

        def __exit__(self, error: Any, *rest: Any) -> Any:
            if error is None:
                try:
                    step(commits=True)
                except sqlite3.OperationalError:
                    self.rollback()
                    raise
            handled = super().__exit__(error, *rest)
            steps.done()
            return handled

    connect = sqlite3.connect

    def connected(database: Any, **options: Any) -> sqlite3.Connection:
        if database == ":memory:":
            return connect(database, **options)
        return connect(database, factory=Connection, **options)

    sqlite3.connect = connected
