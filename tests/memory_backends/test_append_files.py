"""Append-only files: what is committed, what is cut off, and what readers keep."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import pytest

from memory_backends import StoreError
from memory_backends.rows.append_files import AppendFile, AppendFiles


def written(path: Path, data: bytes, record_bytes: int = 4) -> AppendFile:
    file = AppendFile(path, record_bytes, 0)
    file.append(data)
    file.seal()
    file.flush()
    file.show(len(data) // record_bytes)
    return file


class Disk:
    """The file under an `AppendFile`, each write of which takes a few bytes, and may then fail."""

    def __init__(self, file: AppendFile, num_bytes: int, error: OSError | None = None) -> None:
        assert file._file is not None
        self.inner, self.num_bytes, self.error = file._file, num_bytes, error

    def write(self, data: memoryview) -> int:
        written = self.inner.write(data[: self.num_bytes]) or 0
        if self.error is not None:
            raise self.error
        return written

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def bytes_of(file: AppendFile) -> bytes:
    return file.records.numpy().tobytes()


def test_a_seal_ends_a_unit_with_its_checksum(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "f", 4, 0)
    file.append(b"aaaabbbb")
    file.append(memoryview(b"cccc"))
    assert file.seal() == zlib.crc32(b"aaaabbbbcccc")
    file.append(b"dddd")
    assert file.seal() == zlib.crc32(b"dddd")
    file.append(b"eeeeffff")
    file.rewind()
    file.append(b"gggg")
    assert file.seal() == zlib.crc32(b"gggg")
    file.show(5)
    assert bytes_of(file) == (tmp_path / "f").read_bytes() == b"aaaabbbbccccddddgggg"
    assert file.records.shape == (5, 4)


def test_what_is_not_committed_is_cut_off(tmp_path: Path) -> None:
    file = written(tmp_path / "f", b"aaaa")
    file.append(b"bbbbcccc")
    file.seal()
    file.show(2)
    assert bytes_of(file) == (tmp_path / "f").read_bytes() == b"aaaabbbb"


def test_room_is_left_without_taking_space(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "f", 4096, 0)
    file.append(b"a" * 4096)
    file.seal()
    file.skip(1000)
    file.append(b"b" * 4096)
    assert file.seal() == zlib.crc32(b"b" * 4096)
    file.flush()
    file.show(1002)
    assert (tmp_path / "f").stat().st_size == 1002 * 4096
    assert (tmp_path / "f").stat().st_blocks * 512 < 100 * 4096
    assert bytes_of(file) == b"a" * 4096 + bytes(4_096_000) + b"b" * 4096


def test_a_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    file = written(tmp_path / "f", b"aaaabbbb")
    (tmp_path / "new").write_bytes(b"\0\0\0\0bbbb")
    (tmp_path / "new").replace(tmp_path / "f")
    assert bytes_of(file) == b"aaaabbbb"
    held = file.records
    file.show(2, anew=True)
    assert bytes_of(file) == b"\0\0\0\0bbbb"
    assert held.numpy().tobytes() == b"aaaabbbb"


def test_a_write_that_takes_only_a_part_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "f", b"aaaa")
    file.append(b"bbbb")
    monkeypatch.setattr(file, "_file", Disk(file, 3))
    file.append(b"ccccdddd")
    assert file.seal() == zlib.crc32(b"bbbbccccdddd")
    file.show(4)
    assert bytes_of(file) == b"aaaabbbbccccdddd"


def test_a_full_disk_is_reported_and_the_next_append_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "f", b"aaaa")
    file.append(b"bbbb")
    file.seal()
    with monkeypatch.context() as patch:
        patch.setattr(file, "_file", Disk(file, 2, OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            file.append(b"cccc")
        file.rewind()
    file.append(b"dddd")
    assert file.seal() == zlib.crc32(b"dddd")
    file.show(3)
    assert bytes_of(file) == b"aaaabbbbdddd"


def test_names_of_new_files_are_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[str] = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        forced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of descriptors are seen in /proc")
    monkeypatch.setattr(os, "fsync", recording)
    files = AppendFiles(tmp_path / "rows", {0: 4, 3: 2}, {})
    for layer_idx in (0, 3):
        files[layer_idx].append(b"aaaa")
    files.flush()
    assert forced == ["layer-000.bin", "layer-003.bin", "rows", tmp_path.name]
    files.show({0: 1, 3: 2})
    files[0].append(b"bbbb")
    forced.clear()
    files.flush()
    assert forced == ["layer-000.bin"]
    files.close()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_leads_out_of_the_store_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "layer-000.bin").write_bytes(b"mine")
    if what == "folder":
        (tmp_path / "rows").symlink_to(tmp_path / "outside")
    else:
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "layer-000.bin").symlink_to(tmp_path / "outside" / "layer-000.bin")
    with pytest.raises(StoreError, match="it is a symbolic link"):
        AppendFiles(tmp_path / "rows", {0: 4}, {0: 1})
    files = AppendFiles(tmp_path / "rows", {0: 4}, {})
    with pytest.raises(StoreError, match="it is a symbolic link"):
        files[0].append(b"aaaa")
    assert (tmp_path / "outside" / "layer-000.bin").read_bytes() == b"mine"
