"""The write that makes a store: what was set before is kept, and a failure leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_backends import MemoryBackend, Rows
from memory_backends.catalog import Catalog
from memory_backends.testing.rows import IDENTITY, LAYOUT, make_document, make_rows

KINDS = pytest.mark.parametrize("kind", ["manual", "vector_db"])


def failing_rows() -> Iterator[Rows]:
    yield make_rows(3, seed=0)
    raise KeyboardInterrupt


@KINDS
def test_settings_made_before_the_first_write_reach_the_store(kind: str, tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, kind, path=tmp_path / "m", identity=IDENTITY)
    backend.catalog.set_setting("model", "some/model")
    assert not (tmp_path / "m").exists()
    backend.add(make_document("a", 5), [make_rows(5, seed=0)])
    assert Catalog.open(tmp_path / "m").setting("model") == "some/model"


@KINDS
@pytest.mark.parametrize("directory_exists", [False, True])
def test_a_first_write_that_fails_leaves_nothing_and_can_be_tried_again(
    kind: str, directory_exists: bool, tmp_path: Path
) -> None:
    if directory_exists:
        (tmp_path / "m").mkdir()
    backend = MemoryBackend(LAYOUT, kind, path=tmp_path / "m", identity=IDENTITY)
    backend.catalog.set_setting("model", "some/model")
    with pytest.raises(KeyboardInterrupt):
        backend.add(make_document("a", 5), failing_rows())
    assert (tmp_path / "m").exists() == directory_exists
    assert {file.name for file in tmp_path.rglob("*")} <= {"m", "write.lock"}
    assert len(backend) == 0
    assert backend.add(make_document("a", 5), [make_rows(5, seed=0)]) == range(5)
    reopened = MemoryBackend.open(tmp_path / "m", kind)
    assert len(reopened) == 5
    assert reopened.catalog.setting("model") == "some/model"
