"""Mean values kept in a store: the same as computed anew, whatever became of store and file."""

import json
import zlib

import numpy as np
import pytest

from emt import attach
from emt.routing import values
from emt.routing.mean_values import MeanValues, documents_of
from emt.routing.values import ValueIndex
from memory_backends import verify
from tests.emt.routing.worlds import BACKENDS, attached_model, build, document, routing
from tests.read_only import forbid_writing

NAME = "mean-values.derived"
QUESTION = document(1)[10:20]


def saved(tmp_path, memory_type="vector_db", **settings):
    """Return a memory that was saved to a store."""
    options = {**BACKENDS[memory_type], "path": str(tmp_path / "store"), **settings}
    memory = routing(build("llama"), memory_type, **options)
    memory.save()
    return memory


def scores_of(memory):
    return ValueIndex(attached_model(memory)).scores(QUESTION, memory.backend)[1]


@pytest.fixture
def read(monkeypatch):
    """Return a list of how many rows' values were read from the memory, each time."""
    numbers = []
    own = values._stored_values
    monkeypatch.setattr(
        values, "_stored_values", lambda rows, *rest: numbers.append(len(rows)) or own(rows, *rest)
    )
    return numbers


@pytest.mark.parametrize("memory_type", BACKENDS)
def test_a_saved_memory_reads_no_values_again(memory_type, tmp_path, read):
    memory = saved(tmp_path, memory_type)
    (tmp_path / "store" / NAME).rename(tmp_path / "kept")
    anew = scores_of(memory)
    assert read
    (tmp_path / "kept").rename(tmp_path / "store" / NAME)
    config = memory.config
    memory.close()
    again = attach(build("llama"), config)
    read.clear()
    np.testing.assert_array_equal(scores_of(again), anew)
    assert read == []
    assert verify(tmp_path / "store") == []


def test_of_a_changed_memory_only_new_documents_are_read(tmp_path, read):
    memory = saved(tmp_path)
    memory.remove("one")
    memory.write(document(5), document="new")
    memory.write(document(3), document="two", replace=True)
    read.clear()
    scores = scores_of(memory)
    assert set(read) == {len(document(5)) + len(document(3))}
    memory.save()
    read.clear()
    np.testing.assert_array_equal(scores_of(memory), scores)
    assert read == []
    (tmp_path / "store" / NAME).unlink()
    np.testing.assert_array_equal(scores_of(memory), scores)


def test_documents_of_another_store_are_not_taken_for_its_own(tmp_path, read):
    memory = saved(tmp_path / "a")
    other = routing(build("llama"), "vector_db", path=str(tmp_path / "b" / "store"))
    other.write(document(6)[:70], document="one", replace=True)
    expected = scores_of(other)
    own = tmp_path / "a" / "store" / NAME
    (tmp_path / "b" / "store" / NAME).write_bytes(own.read_bytes())
    np.testing.assert_array_equal(scores_of(other), expected)
    memory.close()
    other.close()


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    memory = saved(tmp_path)
    path = tmp_path / "store" / NAME
    data, expected = path.read_bytes(), scores_of(memory)
    rng = np.random.default_rng(0)
    spoiled = [b"", data[:3], data[:-1], data + b"x"]
    for at in [0, 1, *rng.integers(0, len(data), 30).tolist()]:
        spoiled.append(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    for contents in spoiled:
        path.write_bytes(contents)
        np.testing.assert_array_equal(scores_of(memory), expected)
        assert verify(tmp_path / "store") == []
    memory.save()  # what it has in RAM is not written again
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(data)
    np.testing.assert_array_equal(scores_of(memory), expected)


@pytest.mark.parametrize(
    "forged",
    [
        {"documents": 2**60},
        {"runs": 2**60},
        {"documents": -1},
        {"documents": 0},
        {"runs": "many"},
        {"layers": [0]},
        {"format": 2},
        {"dims": 2**40},
    ],
)
def test_a_forged_header_is_refused_before_anything_is_allocated(tmp_path, forged):
    memory = saved(tmp_path)
    path, expected = tmp_path / "store" / NAME, scores_of(memory)
    data = path.read_bytes()
    header = json.dumps({**json.loads(data[:1024]), **forged}).ljust(1024).encode()
    body = header + data[1024:-4]
    path.write_bytes(body + zlib.crc32(body).to_bytes(4, "little"))
    assert MeanValues.read(memory.backend, [3]) is None
    np.testing.assert_array_equal(scores_of(memory), expected)


def test_copies_have_it_and_compacting_takes_it_away(tmp_path, read):
    memory = saved(tmp_path)
    memory.save(tmp_path / "copy")
    assert (tmp_path / "copy" / NAME).read_bytes() == (tmp_path / "store" / NAME).read_bytes()
    memory.remove("one")
    memory.compact()
    assert not (tmp_path / "store" / NAME).exists()  # it told of a document that was removed
    memory.save()
    read.clear()
    scores_of(memory)
    assert read == []
    memory.backend.rebuild()
    assert not (tmp_path / "store" / NAME).exists()


def test_a_store_that_cannot_be_written_is_used_as_it_is(tmp_path, monkeypatch):
    memory = saved(tmp_path)
    config, expected = memory.config, scores_of(memory)
    memory.close()
    (tmp_path / "store" / NAME).unlink()
    forbid_writing(monkeypatch, tmp_path / "store")
    again = attach(build("llama"), config)
    np.testing.assert_array_equal(scores_of(again), expected)
    again.save()
    again.close()
    assert not (tmp_path / "store" / NAME).exists()


def test_token_mode_and_other_voices_keep_nothing(tmp_path):
    for number, settings in enumerate(({"mode": "token"}, {"routing": "heads"})):
        saved(tmp_path / str(number), **settings)
        assert not (tmp_path / str(number) / "store" / NAME).exists()


def test_means_are_rounded_once(tmp_path):
    rng = np.random.default_rng(1)
    documents = np.array([[0, 100, 5], [100, 20, 6]])
    means = rng.normal(size=(2, 4, 128)).astype(np.float32) * 1e6
    means[1, 2] = 0
    kept = MeanValues.none([4, 9]).brought_to(documents, lambda runs: means[:, : len(runs.starts)])
    assert len(kept.runs.starts) == 4
    np.testing.assert_allclose(kept.means, means, atol=1e6 * 4 / 2**11)
    again = MeanValues.none([4, 9]).brought_to(documents, lambda runs: kept.means)
    np.testing.assert_array_equal(again.halves, kept.halves)
    fewer = kept.brought_to(documents[1:], lambda runs: means[:, :0])
    np.testing.assert_array_equal(fewer.means, kept.means[:, 3:])


def test_documents_are_told_apart_by_their_records(tmp_path):
    memory = saved(tmp_path)
    documents = documents_of(memory.backend.catalog)
    assert documents[:, 0].tolist() == memory.backend.catalog.first_rows().tolist()
    assert len(set(documents[:, 2].tolist())) == 3
