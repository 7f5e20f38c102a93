"""One writer, whose name others are told."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from memory_backends import StoreError
from memory_backends.store.lock import write_lock

HOLD = """
import sys
from pathlib import Path
from memory_backends.store.lock import write_lock
with write_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_named(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdin is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(StoreError) as caught, write_lock(tmp_path):
            pass
        message = str(caught.value)
        start = f"another process is writing to '{tmp_path}': PID {owner.pid} ({sys.executable} -c"
        assert message.startswith(start)
        assert f") on {socket.gethostname()} since 20" in message
        assert message.endswith("; wait for it, or stop it.")
        owner.stdin.close()
        owner.wait()
    assert [file.name for file in tmp_path.iterdir()] == ["write.lock"]
    with write_lock(tmp_path):
        owner_file = json.loads((tmp_path / "writer.json").read_text())
        assert owner_file["pid"] == os.getpid()
    assert not (tmp_path / "writer.json").exists()


def test_this_process_is_named(tmp_path: Path) -> None:
    with write_lock(tmp_path):
        message = f"this process is writing to '{tmp_path}' already"
        with pytest.raises(StoreError, match=re.escape(message)), write_lock(tmp_path):
            pass


@pytest.mark.parametrize(
    "left_over",
    [
        "",
        "[]",
        "{",
        '{"pid": "x"}',
        "[" * 4000,
        # A process that is gone: the largest PID that Linux gives is 2**22.
        json.dumps(
            {"pid": 2**22 + 1, "host": socket.gethostname(), "command": "emt", "since": "2020"}
        ),
    ],
)
def test_a_file_left_over_is_not_believed(tmp_path: Path, left_over: str) -> None:
    (tmp_path / "writer.json").write_text(left_over)
    with filelock.FileLock(tmp_path / "write.lock"):
        message = f"another process is writing to '{tmp_path}'; wait for it, or stop it."
        with pytest.raises(StoreError) as caught, write_lock(tmp_path):
            pass
        assert str(caught.value) == message
    with write_lock(tmp_path):  # and it is in nobody's way
        pass


def test_what_another_host_says_is_made_printable(tmp_path: Path) -> None:
    owner = {"pid": 7, "host": "far", "command": "emt \x1b[2J index", "since": "2026"}
    (tmp_path / "writer.json").write_text(json.dumps(owner))
    with (
        filelock.FileLock(tmp_path / "write.lock"),
        pytest.raises(StoreError, match=r"PID 7 \(emt  \[2J index\) on far since 2026; wait"),
        write_lock(tmp_path),
    ):
        pass


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "write.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match="symbolic link"), write_lock(tmp_path / "store"):
        pass
    assert (tmp_path / "mine").read_text() == "kept"
