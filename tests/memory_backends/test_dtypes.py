"""A store that was written in one dtype, read and written in another."""

import logging

import torch
import numpy as np
import pytest

from memory_backends import MemoryBackend, MemoryLayout, Rows, verify
from memory_backends.errors import MemoryMismatchError
from memory_backends.rows import files
from memory_backends.rows.codecs import CODEC_NAMES, TEXT
from memory_backends.store.sketch import Sketch
from memory_backends.testing.rows import LAYERS, make_document, make_queries, make_rows, nearest

CODECS = [name for name in CODEC_NAMES if name != TEXT]  # those that keep rows

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAIRS = [(one, other) for one in DTYPES for other in DTYPES if one != other]
OPTIONS = {"manual": {}, "vector_db": {"index": "Flat"}}
CASES = [(*pair, "exact") for pair in PAIRS] + [
    ("bfloat16", "float32", codec) for codec in CODECS if codec != "exact"
]
PLAIN = ("exact", "float16", "bfloat16")
PARTS = ("keys", "values")


@pytest.fixture(autouse=True)
def few_rows_are_enough(monkeypatch):
    """Let codecs learn from the first ten rows."""
    monkeypatch.setattr(files, "ROWS_TO_LEARN", 10)


def rows(seed, dtype, num_rows=30):
    return make_rows(num_rows, seed, layout=MemoryLayout(LAYERS, DTYPES[dtype]))


def converted(written, dtype):
    """Return rows in another dtype."""
    keys, values = (
        {idx: tensor.to(DTYPES[dtype]) for idx, tensor in part.items()}
        for part in (written.keys, written.values)
    )
    return Rows(keys, values, written.tokens, written.sinks)


def opened(path, dtype, memory_type="manual", **options):
    layout = MemoryLayout(LAYERS, DTYPES[dtype])
    return MemoryBackend(layout, memory_type, path=path, **OPTIONS[memory_type], **options)


def filled(path, dtype, memory_type="manual", **options):
    backend = opened(path, dtype, memory_type, **options)
    for seed, name in enumerate("ab"):
        backend.add(make_document(name, 30), [rows(seed, dtype)])
    backend.remove([3])
    backend.save()
    return backend


def fetched(backend, layer_idx):
    """Return all keys (Hkv, n, D) and values (Hkv, n, Dv) of a layer."""
    heads = LAYERS[layer_idx].num_key_value_heads
    return backend.fetch(layer_idx, torch.arange(backend.catalog.num_rows).expand(heads, -1))


def assert_searches_what_it_has(backend):
    """Compare searches with brute force over the rows that the backend gives back.

    An index may have been made of keys before they were rounded: by so much, another row may be
    found in the place of one, and scores may differ.
    """
    searchable = backend.catalog.searchable_rows("all")
    for layer_idx in LAYERS:
        keys, queries = fetched(backend, layer_idx)[0].double(), make_queries(layer_idx, 6)
        scores, _ = nearest(keys.numpy(), queries, 5, searchable)
        hits = backend.retrieve(layer_idx, queries, 5)
        assert np.isin(hits.ids, searchable).all()
        for head, (of_head, asked) in enumerate(zip(hits.ids, queries.double(), strict=True)):
            cosines = torch.cosine_similarity(keys[head][of_head], asked.unsqueeze(1), dim=-1)
            for found in (cosines, hits.scores[head]):
                np.testing.assert_allclose(found, scores[head], atol=2**-8)
            assert torch.equal(hits.keys[head].double(), keys[head][of_head])
        assert hits.keys.dtype == hits.values.dtype == backend.layout.dtype
        last = [len(queries) - 1]
        assert torch.equal(
            backend.search(layer_idx, queries[last], 5, heads=last).ids, hits.ids[last]
        )


@pytest.mark.parametrize("memory_type", OPTIONS)
@pytest.mark.parametrize(("written", "read", "codec"), CASES)
def test_rows_are_those_that_were_written_but_for_rounding(
    tmp_path, written, read, codec, memory_type
):
    own = filled(tmp_path / "m", written, memory_type, row_codec=codec)
    other = opened(tmp_path / "m", read, memory_type)
    assert other.layout.dtype == DTYPES[read]
    stored = DTYPES[written if codec == "exact" else codec] if codec in PLAIN else None
    for layer_idx in LAYERS:
        keys, values = fetched(other, layer_idx)
        for got, of_own, part in zip((keys, values), fetched(own, layer_idx), PARTS, strict=True):
            assert got.dtype == DTYPES[read]
            if stored is None:  # quantised; decoded to either dtype
                torch.testing.assert_close(got.double(), of_own.double(), rtol=2**-7, atol=1e-6)
                continue
            given = [getattr(rows(seed, written), part)[layer_idx] for seed in (0, 1)]
            assert torch.equal(got, torch.cat(given, dim=1).to(stored).to(DTYPES[read]))
    assert_searches_what_it_has(other)


@pytest.mark.parametrize("memory_type", OPTIONS)
@pytest.mark.parametrize(("first", "second", "codec"), CASES)
def test_new_rows_are_kept_in_the_stores_dtype(tmp_path, first, second, codec, memory_type):
    """The store is, byte for byte, the one that had got the same rows in its own dtype."""
    for name in ("one", "two"):
        filled(tmp_path / name, first, memory_type, row_codec=codec).close()
    new = rows(7, second)
    other = opened(tmp_path / "one", second, memory_type)
    other.add(make_document("c", 30), [new])
    other.save()
    own = opened(tmp_path / "two", first, memory_type)
    own.add(make_document("c", 30), [converted(new, first)])
    own.save()
    assert_searches_what_it_has(other)
    assert verify(tmp_path / "one") == []
    if codec in ("exact", first):  # else a second rounding comes between
        for idx in LAYERS:
            file = f"rows/layer-{idx:03d}.bin"
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert MemoryBackend.open(tmp_path / "one").layout.dtype == DTYPES[first]


@pytest.mark.parametrize("memory_type", OPTIONS)
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize(("written", "read"), PAIRS)
def test_rows_that_a_codec_will_learn_from(
    tmp_path, written, read, codec, memory_type, monkeypatch
):
    """They are exact in the store's dtype, and so they are coded by whoever adds the last."""
    monkeypatch.setattr(files, "ROWS_TO_LEARN", 90)
    for name in ("one", "two"):
        filled(tmp_path / name, written, memory_type, row_codec=codec).close()
    other = opened(tmp_path / "one", read, memory_type)
    given = [rows(seed, written) for seed in (0, 1)]
    for layer_idx in LAYERS:
        for got, part in zip(fetched(other, layer_idx), PARTS, strict=True):
            exact = torch.cat([getattr(run, part)[layer_idx] for run in given], dim=1)
            assert torch.equal(got, exact.to(DTYPES[read]))
    assert_searches_what_it_has(other)
    given.append(rows(7, written, 40))
    other.add(make_document("c", 40), [converted(given[-1], read)])
    own = opened(tmp_path / "two", written, memory_type)
    own.add(make_document("c", 40), [given[-1]])
    assert_searches_what_it_has(other)
    assert verify(tmp_path / "one") == verify(tmp_path / "two") == []
    for idx in LAYERS:
        name = f"rows/layer-{idx:03d}.bin"
        is_same = (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert is_same or read != "float32"  # which holds the numbers of both others
        for *coded, part in zip(fetched(other, idx), fetched(own, idx), PARTS, strict=True):
            exact = torch.cat([getattr(run, part)[idx] for run in given], dim=1).double()
            error, of_own = ((got.double() - exact).norm() / exact.norm() for got in coded)
            assert 0 < error < 1.02 * of_own + 2**-8


def test_a_copy_has_the_dtype_of_the_store(tmp_path):
    filled(tmp_path / "m", "bfloat16", "vector_db").close()
    other = opened(tmp_path / "m", "float32", "vector_db")
    other.save(tmp_path / "copy")
    copy = MemoryBackend.open(tmp_path / "copy", "vector_db", index="Flat")
    assert copy.layout.dtype == torch.bfloat16
    assert verify(tmp_path / "copy") == []
    for idx in LAYERS:
        assert torch.equal(fetched(copy, idx)[0].float(), fetched(other, idx)[0])
    assert_searches_what_it_has(copy)


def test_it_is_said_once(tmp_path, caplog):
    filled(tmp_path / "m", "bfloat16").close()
    caplog.set_level(logging.WARNING, "memory_backends")
    opened(tmp_path / "m", "bfloat16")
    assert not caplog.records
    other = opened(tmp_path / "m", "float32")
    other.add(make_document("c", 30), [rows(7, "float32")])
    other.search(0, make_queries(0, 2), 3)
    (record,) = caplog.records
    assert (
        "written in torch.bfloat16: its rows are converted to torch.float32" in record.getMessage()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_beyond_float16(tmp_path, dtype):
    """They are refused by a store in float16, and its largest number for a model in float16."""
    filled(tmp_path / "half", "float16").close()
    large = rows(7, dtype)
    large.values[3][0, 2, 1] = 1e6
    backend = opened(tmp_path / "half", dtype)
    with pytest.raises(MemoryMismatchError, match=r"float16, with numbers up to 65504; got "):
        backend.add(make_document("c", 30), [large])
    assert backend.catalog.document_names() == ["a", "b"]
    assert_searches_what_it_has(backend)

    wide = opened(tmp_path / "wide", dtype)
    wide.add(make_document("c", 30), [large])
    values = fetched(opened(tmp_path / "wide", "float16"), 3)[1]
    assert values[0, 2, 1] == 65504
    assert bool(values.isfinite().all())


def described(dtype, weights, **more):
    """Return the identity of a model that has weights, given as float32, in a dtype."""
    named = [(name, tensor.to(DTYPES[dtype])) for name, tensor in weights.items()]
    sketch = Sketch.of("tiny", 1, named).to_json()
    return {"dtype": dtype, "weights": f"hash of {dtype}", "sketch": sketch, "heads": 2, **more}


@pytest.fixture
def weights():
    return {name: torch.randn(30, 40) for name in "abcde"}


@pytest.mark.parametrize(("written", "read"), PAIRS)
def test_the_model_must_have_the_same_weights(tmp_path, weights, written, read):
    own = described(written, weights)
    filled(tmp_path / "m", written, identity=own).close()
    assert len(opened(tmp_path / "m", read, identity=described(read, weights))) == 59
    trained = {**weights, "c": weights["c"] * 1.02}
    for other in (trained, {**weights, "lora": torch.ones(3)}):
        with pytest.raises(MemoryMismatchError, match=f"dtype: .*'{written}', this model '{read}'"):
            opened(tmp_path / "m", read, identity=described(read, other))
    with pytest.raises(MemoryMismatchError, match="another model; heads: the memory has 2, this"):
        opened(tmp_path / "m", read, identity=described(read, weights, heads=4))
    hash_alone = {key: value for key, value in own.items() if key != "sketch"} | {"dtype": read}
    with pytest.raises(MemoryMismatchError, match="dtype"):
        opened(tmp_path / "m", read, identity=hash_alone)
    with pytest.raises(MemoryMismatchError, match="another model; weights"):  # the hash decides
        opened(tmp_path / "m", written, identity={**own, "weights": "other"})
    with pytest.raises(MemoryMismatchError, match="not a sketch"):
        opened(tmp_path / "m", read, identity={**hash_alone, "sketch": {"names": "?"}})
