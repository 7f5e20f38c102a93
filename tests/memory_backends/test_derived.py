"""Files derived from rows: as they were written, or none."""

from pathlib import Path

import pytest

from memory_backends import MemoryBackend
from memory_backends.store.derived import read_derived, remove_derived, write_derived
from tests.torture.made_up import IDENTITY, LAYOUT, document, runs_of


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_derived(tmp_path, "a") is None
    write_derived(tmp_path, "a", [b"one", memoryview(b"two")])
    write_derived(tmp_path, "b", [])
    assert read_derived(tmp_path, "a") == b"onetwo"
    assert read_derived(tmp_path, "b") == b""
    write_derived(tmp_path, "a", [b"three"])
    assert read_derived(tmp_path, "a") == b"three"
    assert {path.name for path in tmp_path.iterdir()} == {"a.derived", "b.derived"}


def test_a_write_that_fails_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_derived(tmp_path, "a", [b"one"])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="space"):
        write_derived(tmp_path, "a", [b"two"])
    assert read_derived(tmp_path, "a") == b"one"
    assert len(list(tmp_path.iterdir())) == 1


def test_links_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"precious")
    store = tmp_path / "store"
    store.mkdir()
    for name in ("a.derived", "a.derived.partial"):
        (store / name).symlink_to(tmp_path / "outside")
    assert read_derived(store, "a") is None
    write_derived(store, "a", [b"one"])
    assert read_derived(store, "a") == b"one"
    (store / "a.derived.partial").symlink_to(tmp_path / "outside")
    remove_derived(store)
    assert list(store.iterdir()) == []
    assert (tmp_path / "outside").read_bytes() == b"precious"


def test_a_memory_keeps_them_in_its_store_only(tmp_path: Path) -> None:
    in_ram = MemoryBackend(LAYOUT, "manual", identity=IDENTITY)
    in_ram.add(document("a", 1), runs_of("a", 1))
    in_ram.write_derived("x", [b"one"])
    assert in_ram.read_derived("x") is None
    backend = MemoryBackend(LAYOUT, "manual", path=tmp_path / "store", identity=IDENTITY)
    backend.add(document("a", 1), runs_of("a", 1))
    backend.write_derived("x", [b"one"])
    assert backend.read_derived("x") == b"one"
    assert not list((tmp_path / "store").glob("*.partial"))
    backend.close()
