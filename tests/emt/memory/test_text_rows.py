"""A store that keeps text and no rows: recalled passages are read again, and answers are alike."""

import contextlib

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError, MemoryMismatchError, StoreError
from emt.ingest.rereading import BLOCK
from memory_backends.sharded import merge, split
from memory_backends.store.verify import verify
from tests.emt.modes.generation import GREEDY
from tests.emt.routing.worlds import asked, build, document, profile_of, tokens

NAMES = [f"document {number}" for number in range(4)]
WHOLE = 10**6  # context: as much as there is
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@contextlib.contextmanager
def opened(model, path, **settings):
    """Yield a memory in passage mode, whose documents are windows of their own."""
    options = {
        "path": str(path),
        "memory_type": "vector_db",
        "index": "Flat",
        "mode": "passage",
        "routing": "heads",
        "remove_special_ids": False,
        "passage_rows": 24,
        "max_passages": 2,
        "relevance": None,
        "reread_context": WHOLE,
        **settings,
    }
    memory = attach(model, MemoryConfig.published(**options))
    try:
        yield memory
    finally:
        detach(model)
        memory.close()


def filled(memory, profile):
    memory.keep_profile(profile)
    for number, name in enumerate(NAMES):
        memory.write(document(number), document=name)
    memory.save()


def all_rows(memory):
    return memory.backend.fetch_layers(
        torch.from_numpy(memory.backend.catalog.searchable_rows("all"))
    )


def passages(memory):
    return [
        [each.passage for each in memory.route(asked(number)).passages]
        for number in range(len(NAMES))
    ]


def answers(model):
    return [model.generate(asked(number)[None], **GREEDY).tolist() for number in range(len(NAMES))]


@pytest.mark.parametrize("memory_type", ["manual", "vector_db", "sharded"])
def test_passages_rows_and_answers_are_those_of_kept_rows(tmp_path, memory_type):
    """Before and after documents come and go, and of a store that is opened again."""
    model = build("llama")
    profile, found = profile_of(model), []
    for codec in ("exact", "text"):
        settings = {"memory_type": memory_type, "row_codec": codec}
        with opened(model, tmp_path / codec, **settings) as memory:
            filled(memory, profile)
            first = passages(memory), answers(model), all_rows(memory)
            memory.remove(NAMES[0])
            memory.write(document(6), document=NAMES[2], replace=True)
            memory.compact()
            memory.save()
            second = passages(memory), answers(model), all_rows(memory)
        assert verify(tmp_path / codec) == []
        with opened(model, tmp_path / codec, **settings) as memory:
            assert memory.backend.keeps_rows == (codec == "exact")
            third = passages(memory), answers(model), all_rows(memory)
        found.append((first, second, third))
    for exact, text in zip(*found, strict=True):
        assert text[:2] == exact[:2]
        assert any(exact[0])
        for layer_idx, parts in exact[2].items():
            for kept, read in zip(parts, text[2][layer_idx], strict=True):
                torch.testing.assert_close(read, kept, **TOLERANCE)


def test_judged_candidates_are_read_in_few_forwards_and_once(tmp_path):
    """The rows of the answer's passages are those that candidates were judged by."""
    model = build("llama")
    profile = profile_of(model)
    settings = {"candidates": 4, "row_codec": "text"}
    with opened(model, tmp_path, **settings) as memory:
        filled(memory, profile)
        source = memory.backend.row_source
        memory.route(asked(1))
        num_read = source.num_read
        assert 0 < num_read <= sum(len(document(number)) for number in range(len(NAMES)))
        memory.route(asked(1))
        model(asked(1)[None])
        assert source.num_read == num_read


def test_kept_blocks_are_bounded(tmp_path):
    """Those used last are kept; the others are read again, and rows do not depend on it."""
    model = build("llama")
    profile, long = profile_of(model), tokens(5 * BLOCK, 3)
    with opened(model, tmp_path / "a", row_codec="text", reread_context=8) as memory:
        memory.keep_profile(profile)
        memory.write(long, document="long")
        source = memory.backend.row_source
        expected = all_rows(memory)
        of_block = source.num_bytes // 5
        assert source.num_bytes == sum(part.nbytes for pair in expected.values() for part in pair)
    with opened(
        model, tmp_path / "a", row_codec="text", reread_context=8, reread_bytes=2 * of_block
    ) as memory:
        source, fetch = memory.backend.row_source, memory.backend.fetch_layers
        fetch(torch.arange(0, 2 * BLOCK))
        fetch(torch.tensor([0]))
        num_read = source.num_read
        fetch(torch.tensor([2 * BLOCK]))  # takes the place of the second
        assert source.num_bytes == 2 * of_block
        assert source.num_read == num_read + 4 + 8 + BLOCK
        fetch(torch.tensor([[0, -1], [2 * BLOCK + 1, 5]]))
        assert source.num_read == num_read + 4 + 8 + BLOCK
        for layer_idx, (keys, values) in all_rows(memory).items():
            torch.testing.assert_close(keys, expected[layer_idx][0], **TOLERANCE)
            torch.testing.assert_close(values, expected[layer_idx][1], **TOLERANCE)
        assert source.num_bytes == 2 * of_block


def test_no_more_is_read_at_once_than_a_window(tmp_path):
    """However much context is asked for."""
    model = build("llama")
    profile, window = profile_of(model), 2 * BLOCK
    settings = {"row_codec": "text", "stride": BLOCK, "max_length": window}
    with opened(model, tmp_path, **settings) as memory:
        memory.keep_profile(profile)
        memory.write(tokens(5 * BLOCK, 3), document="long")
        all_rows(memory)
        assert memory.backend.row_source.num_read == BLOCK + 4 * window


def test_copies_are_alike(tmp_path):
    """A copy, shards of a store and the store of shards find the same, and read the same rows."""
    model = build("llama")
    profile = profile_of(model)
    with opened(model, tmp_path / "one", row_codec="text") as memory:
        filled(memory, profile)
        expected = passages(memory), answers(model)
        memory.save(tmp_path / "copy")
    split(tmp_path / "one", tmp_path / "shards", 2)
    merge([tmp_path / "shards"], tmp_path / "merged")
    for name in ("copy", "shards", "merged"):
        assert verify(tmp_path / name) == []
        with opened(model, tmp_path / name) as memory:
            assert not memory.backend.keeps_rows
            assert (passages(memory), answers(model)) == expected, name


def test_a_memory_in_ram_is_saved_without_rows(tmp_path):
    """In RAM it has rows; the copy has the keys of the heads that were searched."""
    model = build("llama")
    profile = profile_of(model)
    options = {"path": None, "memory_type": "manual", "row_codec": "text"}
    config = {**options, "mode": "passage", "routing": "heads", "relevance": None}
    memory = attach(model, MemoryConfig.published(**config, passage_rows=24))
    for number, name in enumerate(NAMES):
        memory.write(document(number), document=name)
    memory.keep_profile(profile)
    assert memory.backend.keeps_rows
    memory.save(tmp_path / "copy")
    detach(model)
    with opened(model, tmp_path / "copy", max_passages=3) as memory:
        assert not memory.backend.keeps_rows
        assert any(passages(memory))


def test_files_have_the_keys_of_the_profile_alone(tmp_path):
    model = build("llama")
    profile = profile_of(model)
    with opened(model, tmp_path, row_codec="text") as memory:
        filled(memory, profile)
        heads = profile.key_value_heads(memory._model.query_heads, memory.backend.layout)
        num_rows = memory.backend.catalog.num_rows
        layout = memory.backend.layout
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "rows").iterdir()}
    assert sizes == {
        f"layer-{idx:03d}.bin": num_rows * len(of) * (2 + layout.layers[idx].head_dim)
        for idx, of in heads.items()
    }


def test_what_needs_rows_is_refused(tmp_path):
    model = build("llama")
    profile, other = profile_of(model), profile_of(model, ((1, 0),))
    with (
        pytest.raises(ConfigError, match="mode 'passage'"),
        opened(model, tmp_path / "t", row_codec="text", mode="token"),
    ):
        pass
    with opened(model, tmp_path / "a", row_codec="text") as memory:
        filled(memory, profile)
        with pytest.raises(ConfigError, match="row_codec 'text'"), memory.using(mode="token"):
            pass
        with pytest.raises(ConfigError, match="stored values"), memory.using(routing="values"):
            memory.route(asked(0))
        with pytest.raises(StoreError, match="keeps text and no rows"):
            memory.backend.fetch(0, torch.zeros(2, 1, dtype=torch.long))
        with pytest.raises(MemoryMismatchError, match="head profile"):
            memory.keep_profile(other)
        assert passages(memory)
