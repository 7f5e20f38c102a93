"""Stores whose rows are coded: what is learned, when it is committed, and that bytes stay bytes."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest

from memory_backends import (
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    MemoryMismatchError,
    Rows,
    StoreError,
    verify,
)
from memory_backends.catalog import Catalog
from memory_backends.rows import files
from memory_backends.rows.base import interleave
from memory_backends.rows.codecs import CODEC_NAMES, TEXT, row_codec
from memory_backends.rows.coding import record_bytes
from memory_backends.rows.files import ROWS_TO_LEARN, RowFiles
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import IDENTITY, LAYERS, LAYOUT, make_document, make_rows

CODECS = [name for name in CODEC_NAMES if name != TEXT]  # those that keep rows

LEARNING = pytest.mark.parametrize("codec", ["int8", "int5.5", "int4"])
RUNS = [make_rows(10, seed=1, sinks=[0]), make_rows(7, seed=2, sinks=[0])]


@pytest.fixture(autouse=True)
def few_rows_are_enough(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let codecs learn from the first ten rows, but for tests of how many they learn from."""
    if "many_rows" not in request.fixturenames:
        monkeypatch.setattr(files, "ROWS_TO_LEARN", 10)


@pytest.fixture
def many_rows() -> int:
    """Return how many rows a codec needs, which are then left as they are."""
    return ROWS_TO_LEARN


def fill(backend: MemoryBackend, runs: list[Rows] = RUNS) -> None:
    for at, run in enumerate(runs):
        backend.add(make_document(str(at), len(run)), [run])


def states_of(store: Path) -> dict[int, bytes]:
    connection = sqlite3.connect(store / "catalog.sqlite")
    result = dict(connection.execute("SELECT layer, state FROM codec_states").fetchall())
    connection.close()
    return result


def row_bytes(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (store / "rows").iterdir()}


def fetched(backend: MemoryBackend, num_rows: int = 17) -> list[bytes]:
    result = []
    for layer_idx, layer in LAYERS.items():
        ids = torch.arange(num_rows).expand(layer.num_key_value_heads, -1)
        result += [part.numpy().tobytes() for part in backend.fetch(layer_idx, ids)]
    return result


def by_hand(codec_name: str, runs: list[Rows], learned_from: int) -> tuple[dict[int, bytes], ...]:
    """Return layer -> state and layer -> file, made with the codec alone."""
    codec, states, files = row_codec(codec_name, torch.float32), {}, {}
    for layer_idx, layer in LAYERS.items():
        rows = torch.cat([interleave(run, layer_idx) for run in runs])
        states[layer_idx] = codec.learn(layer, rows[:learned_from])
        coder = codec.coder(layer, states[layer_idx])
        records = [coder.encode(interleave(run, layer_idx)) for run in runs]
        files[layer_idx] = torch.cat(records).numpy().tobytes()
    return states, files


@pytest.mark.parametrize("codec", CODECS)
def test_files_have_what_the_codec_makes_of_rows(codec: str, tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "m", row_codec=codec)
    fill(backend)
    assert_fetches(backend, RUNS)
    assert_finds(backend, RUNS, range(17))
    states, files = by_hand(codec, RUNS, 10)  # of the first run
    assert states_of(tmp_path / "m") == {idx: state for idx, state in states.items() if state}
    assert row_bytes(tmp_path / "m") == {f"layer-{idx:03d}.bin": d for idx, d in files.items()}
    (span, _) = backend.catalog.record_spans()
    sizes = record_bytes(LAYOUT, codec)
    assert span.row_crc32 == tuple(zlib.crc32(files[idx][: 10 * sizes[idx]]) for idx in (0, 3))
    assert backend.catalog.bytes_per_row == sum(map(len, files.values())) / 17
    backend.save()
    assert verify(tmp_path / "m") == []
    before = fetched(backend)
    backend.close()
    for other in ("manual", "vector_db"):  # whatever is asked for
        reopened = MemoryBackend.open(tmp_path / "m", other, row_codec="exact")
        assert reopened.catalog.row_codec == codec
        assert fetched(reopened) == before


@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(1, 1), (3, 5), (33, 7), (80, 80)])
@pytest.mark.parametrize("codec", CODECS)
def test_odd_dims_are_kept(codec: str, head_dim: int, value_head_dim: int, tmp_path: Path) -> None:
    layout = MemoryLayout({2: LayerLayout(3, head_dim, value_head_dim)}, torch.float16)
    rows = make_rows(300, seed=1, layout=layout)
    backend = MemoryBackend(layout, "vector_db", path=tmp_path / "m", row_codec=codec)
    backend.add(make_document("a", 300), [rows])
    ids = torch.arange(300).expand(3, -1)
    keys, values = backend.fetch(2, ids)
    assert keys.dtype == values.dtype == torch.float16
    errors = {"exact": 0, "float16": 0, "bfloat16": 0.01, "int8": 0.1, "int5.5": 0.6, "int4": 0.8}[
        codec
    ]
    for stored, written in ((keys, rows.keys[2]), (values, rows.values[2])):
        error = (stored.float() - written.float()).norm() / written.float().norm()
        assert error <= errors
    assert verify(tmp_path / "m") == []


@LEARNING
def test_small_documents_of_one_transaction_are_learned_from_together(
    codec: str, tmp_path: Path, many_rows: int
) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "m", row_codec=codec)
    runs = [make_rows(50, seed=seed) for seed in range(60)]
    waiting = [(make_document(str(at), 50), [run]) for at, run in enumerate(runs)]
    ids = [result for _, result in backend.add_many(waiting)]
    assert ids == [range(first, first + 50) for first in range(0, 3000, 50)]
    learned_from = -(-ROWS_TO_LEARN // 50) * 50  # whole runs
    states, files = by_hand(codec, runs, learned_from)
    assert states_of(tmp_path / "m") == states
    assert row_bytes(tmp_path / "m") == {f"layer-{idx:03d}.bin": d for idx, d in files.items()}
    assert verify(tmp_path / "m") == []  # every document has its own checksum


def interrupted(rows: Rows) -> Iterator[Rows]:
    yield rows
    raise KeyboardInterrupt


@LEARNING
@pytest.mark.parametrize("num_rows", [10, ROWS_TO_LEARN + 10, None])
def test_a_first_write_that_fails_learns_nothing(
    codec: str, num_rows: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because its rows fail, or else its commit does."""
    path = tmp_path / "m"
    MemoryBackend(LAYOUT, path=path, row_codec=codec).save()  # a store without rows
    backend = MemoryBackend(LAYOUT, path=path)

    def full(*_: Any) -> None:
        raise OSError("no room")

    if num_rows is None:
        with monkeypatch.context() as patch:
            # States are written before documents.
            patch.setattr("memory_backends.catalog.catalog.insert_document", full)
            with pytest.raises(StoreError, match="no room"):
                backend.add(make_document("x", 7), [RUNS[1]])
    else:
        with pytest.raises(KeyboardInterrupt):
            backend.add(make_document("x", num_rows), interrupted(make_rows(num_rows, seed=9)))
    assert states_of(path) == {}
    assert verify(path) == []
    fill(backend)
    assert states_of(path) == by_hand(codec, RUNS, 10)[0]
    assert_fetches(MemoryBackend.open(path), RUNS)


@LEARNING
def test_documents_before_one_that_fails_are_kept(codec: str, tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "m", row_codec=codec)
    long = make_rows(ROWS_TO_LEARN, seed=9)
    documents: list[tuple[Any, Any]] = [
        (make_document("0", 10), [RUNS[0]]),
        (make_document("1", 7), [RUNS[1]]),
        (make_document("x", len(long)), interrupted(long)),
    ]
    with pytest.raises(KeyboardInterrupt):
        list(backend.add_many(documents))
    assert backend.catalog.document_names() == ["0", "1"]
    assert verify(tmp_path / "m") == []
    before = fetched(backend)
    assert fetched(MemoryBackend.open(tmp_path / "m")) == before
    backend.add(make_document("y", 7), [RUNS[1]])
    assert fetched(backend) == before


@LEARNING
def test_a_reader_that_was_there_before_the_first_document_reads_it(
    codec: str, tmp_path: Path
) -> None:
    MemoryBackend(LAYOUT, path=tmp_path / "m", row_codec=codec).save()
    reader, writer = (
        MemoryBackend.open(tmp_path / "m", "vector_db"),
        MemoryBackend.open(tmp_path / "m"),
    )
    assert_finds(reader, RUNS, [])
    fill(writer)
    assert_finds(reader, RUNS, [])
    reader.refresh()
    assert fetched(reader) == fetched(writer)
    reader.add(make_document("c", 7), [RUNS[1]])
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize("codec", CODECS)
def test_copies_and_compaction_move_records_as_they_are(codec: str, tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "m", row_codec=codec)
    fill(backend)
    bytes_before, before = row_bytes(tmp_path / "m"), fetched(backend)
    backend.save(tmp_path / "copy")
    assert row_bytes(tmp_path / "copy") == bytes_before
    assert states_of(tmp_path / "copy") == states_of(tmp_path / "m")
    assert fetched(MemoryBackend.open(tmp_path / "copy")) == before
    backend.remove_document("0")
    backend.compact()
    assert states_of(tmp_path / "copy") == states_of(tmp_path / "m")
    sizes = record_bytes(LAYOUT, codec)
    for idx, size in sizes.items():
        name = f"layer-{idx:03d}.bin"
        assert row_bytes(tmp_path / "m")[name] == bytes(10 * size) + bytes_before[name][10 * size :]
    assert_finds(backend, RUNS, range(10, 17))
    assert verify(tmp_path / "m") == verify(tmp_path / "copy") == []


@pytest.mark.parametrize("codec", CODECS)
def test_a_memory_in_ram_is_exact_until_it_is_saved(codec: str, tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, row_codec=codec)
    fill(backend, [RUNS[1], *RUNS])
    backend.remove_document("0")
    ids = torch.arange(7, 17).expand(2, -1)
    assert torch.equal(backend.fetch(0, ids)[0], RUNS[0].keys[0])
    backend.save(tmp_path / "m")
    assert verify(tmp_path / "m") == []
    states, files = by_hand(codec, RUNS, 10)  # learned from what is left
    assert states_of(tmp_path / "m") == {idx: state for idx, state in states.items() if state}
    for idx, size in record_bytes(LAYOUT, codec).items():
        assert row_bytes(tmp_path / "m")[f"layer-{idx:03d}.bin"] == bytes(7 * size) + files[idx]


@LEARNING
def test_a_memory_saved_when_all_is_removed_learns_later(codec: str, tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, row_codec=codec)
    fill(backend)
    backend.clear()
    backend.save(tmp_path / "m")
    assert states_of(tmp_path / "m") == {}
    assert verify(tmp_path / "m") == []
    assert_finds(MemoryBackend.open(tmp_path / "m"), RUNS, [])
    reopened = MemoryBackend.open(tmp_path / "m", "vector_db")
    reopened.add(make_document("c", 7), [RUNS[1]])
    reopened.add(make_document("d", 10), [RUNS[0]])
    assert states_of(tmp_path / "m").keys() == {0, 3}
    assert_finds(reopened, [*RUNS, RUNS[1], RUNS[0]], range(17, 34))


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    backend = MemoryBackend(
        LAYOUT, "vector_db", path=tmp_path / "m", identity=IDENTITY, row_codec="int4"
    )
    fill(backend)
    backend.save()
    backend.close()
    return tmp_path / "m"


def change(store: Path, statement: str, *parameters: Any) -> None:
    connection = sqlite3.connect(store / "catalog.sqlite")
    connection.execute(statement, parameters)
    connection.commit()
    connection.close()


def test_a_flip_anywhere_in_a_state_is_found(coded: Path) -> None:
    state = states_of(coded)[3]
    generator = np.random.default_rng(3)
    for at in generator.integers(0, len(state), 20):
        flipped = bytearray(state)
        flipped[at] ^= 1 << int(generator.integers(8))
        change(coded, "UPDATE codec_states SET state = ? WHERE layer = 3", bytes(flipped))
        (damage,) = verify(coded)
        assert damage.file == "catalog.sqlite"
        assert "layer 3 is damaged: its checksum does not match" in damage.reason
        backend = MemoryBackend.open(coded)
        with pytest.raises(StoreError, match="learned of layer 3 is damaged"):
            backend.fetch(3, torch.tensor([[1]]))
        with pytest.raises(StoreError, match="learned of layer 3 is damaged"):
            backend.add(make_document("c", 10), [RUNS[0]])
        assert backend.fetch(0, torch.tensor([[1], [1]]))[0].isfinite().all()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (
            "DELETE FROM codec_states WHERE layer = 0",
            "of layer 0 is damaged: it is missing",
        ),
        ("UPDATE codec_states SET layer = 1 WHERE layer = 0", "states of no layer: [1]"),
        ("UPDATE codec_states SET state = 'text' WHERE layer = 0", "layer 0 is damaged"),
        ("UPDATE codec_states SET crc32 = 1 WHERE layer = 0", "layer 0 is damaged"),
    ],
)
def test_other_damage_of_states_is_found(coded: Path, statement: str, reason: str) -> None:
    change(coded, statement)
    assert reason in " ".join(damage.reason for damage in verify(coded))


def test_a_number_beyond_float16_is_refused_before_anything_changed(tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, path=tmp_path / "m", row_codec="float16")
    fill(backend)
    large = make_rows(5, seed=1)
    large.values[3][0, 2, 1] = 1e6
    with pytest.raises(MemoryMismatchError, match=r"float16, with numbers up to 65504; got 1e"):
        backend.add(make_document("x", 5), [large])
    assert_finds(backend, RUNS, range(17))
    assert verify(tmp_path / "m") == []


def test_a_codec_that_is_not_known_here_is_damage(coded: Path) -> None:
    with_unknown = Catalog.open(coded)
    with_unknown.set_setting("row_codec", "int2")
    with pytest.raises(StoreError, match=r"is damaged: row_codec must be one of .*; got 'int2'"):
        Catalog.open(coded)


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_disk_that_fills_while_the_first_rows_are_written(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many_rows: int
) -> None:
    """What fails is as if it had not been written; what came before is there, coded or not."""
    backend = MemoryBackend(LAYOUT, path=tmp_path / "m", row_codec="int8")
    fill(backend)
    before = fetched(backend)
    append: Callable[..., None] = RowFiles.append_rows
    calls = []

    def limited(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == failing:
            raise OSError("full")
        append(*arguments)

    more = make_rows(many_rows, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(RowFiles, "append_rows", limited)
        documents = [(make_document("2", 7), [RUNS[1]]), (make_document("3", many_rows), [more])]
        try:
            list(backend.add_many(documents))
        except StoreError as error:
            assert "full" in str(error)  # noqa: PT017 - later calls of it may never come
    names = backend.catalog.document_names()
    assert names[:2] == ["0", "1"]
    assert verify(tmp_path / "m") == []
    if not states_of(tmp_path / "m"):
        assert fetched(backend) == before
    assert fetched(MemoryBackend.open(tmp_path / "m")) == fetched(backend)
    if "3" not in names:
        backend.add(make_document("3", many_rows), [more])
    assert states_of(tmp_path / "m").keys() == {0, 3}
    assert verify(tmp_path / "m") == []
    assert fetched(MemoryBackend.open(tmp_path / "m")) == fetched(backend)
    assert len(backend) == sum(rows for _, _, rows in backend.catalog.document_sizes())


def kept(store: Path) -> set[str]:
    return {file.name for file in (store / "rows").iterdir()}


FIRST_FILES = {"first-000.bin", "first-003.bin"}
CODED_FILES = {"layer-000.bin", "layer-003.bin"}


@LEARNING
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_rows_are_exact_until_there_are_enough_to_learn_from(
    codec: str, memory_type: str, tmp_path: Path, many_rows: int
) -> None:
    """However many documents and transactions they come in; then all are coded alike."""
    path = tmp_path / "m"
    backend = MemoryBackend(LAYOUT, memory_type, path=path, row_codec=codec)
    fill(backend)
    backend.save()
    reader = MemoryBackend.open(path, memory_type)
    assert kept(path) == FIRST_FILES
    assert states_of(path) == {}
    exact = torch.cat([run.keys[0] for run in RUNS], dim=1)
    ids = torch.arange(17).expand(2, -1)
    assert torch.equal(backend.fetch(0, ids)[0], exact)
    assert_finds(backend, RUNS, range(17))
    backend.save(tmp_path / "copy")
    assert kept(tmp_path / "copy") == FIRST_FILES
    assert verify(path) == verify(tmp_path / "copy") == []
    backend.remove_document("0")
    backend.compact()
    assert_finds(backend, RUNS, range(10, 17))
    runs = [make_rows(100, seed=seed) for seed in range(6)]  # the last makes them enough
    assert 7 + 5 * 100 < many_rows <= 10 + 7 + 5 * 100  # ten removed rows do not count
    for at, run in enumerate(runs):
        assert kept(path) == FIRST_FILES
        backend.add(make_document(f"long {at}", 100), [run])
    assert kept(path) == CODED_FILES
    assert verify(path) == []
    rows = [RUNS[1], *runs]
    states, coded = by_hand(codec, rows, 7 + 6 * 100)
    assert states_of(path) == states
    sizes = record_bytes(LAYOUT, codec)
    for idx, size in sizes.items():
        assert row_bytes(path)[f"layer-{idx:03d}.bin"] == bytes(10 * size) + coded[idx]
    backend.save()
    assert verify(path) == []
    assert_finds(backend, [*RUNS[:1], *rows], range(10, 617))
    assert torch.equal(reader.fetch(0, ids)[0], exact)  # as it was when it was opened
    for other in (reader, MemoryBackend.open(tmp_path / "copy", memory_type)):
        if other is reader:
            other.refresh()
            assert fetched(other, 617) == fetched(backend, 617)
            assert_finds(other, [*RUNS[:1], *rows], range(10, 617))
        other.add(make_document("one more", 10), [RUNS[0]])
    assert verify(path) == verify(tmp_path / "copy") == []
    assert kept(tmp_path / "copy") == FIRST_FILES


@LEARNING
def test_what_a_killed_writer_left_is_nobodys(codec: str, tmp_path: Path, many_rows: int) -> None:
    """Coded files before the commit, or exact ones after it."""
    path = tmp_path / "m"
    backend = MemoryBackend(LAYOUT, path=path, row_codec=codec)
    fill(backend)
    for name in CODED_FILES:
        (path / "rows" / name).write_bytes(b"interrupted")
    assert verify(path) == []
    first = row_bytes(path)
    backend.add(make_document("long", many_rows), [make_rows(many_rows, seed=5)])
    assert kept(path) == CODED_FILES
    for name in FIRST_FILES:
        (path / "rows" / name).write_bytes(first[name])
    again = MemoryBackend.open(path)
    assert verify(path) == []
    assert fetched(again) == fetched(backend)
    again.compact()
    assert kept(path) == CODED_FILES


@LEARNING
def test_odd_rows_do_not_spoil_the_others(codec: str, tmp_path: Path, many_rows: int) -> None:
    """One row alone, constant rows, values of zero, and rows a thousand times as large."""
    usual = make_rows(many_rows, seed=5)

    def mean_error(odd: list[Rows]) -> float:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        backend = MemoryBackend(LAYOUT, path=path, row_codec=codec)
        fill(backend, [*odd, usual])
        num_odd = sum(map(len, odd))
        ids = torch.arange(num_odd, num_odd + many_rows).expand(2, -1)
        parts = zip(backend.fetch(0, ids), (usual.keys[0], usual.values[0]), strict=True)
        errors = [(found - written).norm() / written.norm() for found, written in parts]
        assert verify(path) == []
        return float(torch.stack(errors).mean())

    constant, large, one = (make_rows(n, seed=7) for n in (20, 2, 1))
    for idx in LAYERS:
        constant.keys[idx][:] = 1.0
        constant.values[idx][:] = 0.0
        large.keys[idx] *= 1000
        large.values[idx] *= 1000
    alone = mean_error([])
    for odd in ([one], [constant], [one, constant, constant]):
        assert mean_error(odd) < 1.2 * alone
    assert mean_error([large]) < 2 * alone
