"""Carried context against one plain forward, and against StreamingLLM written out by hand."""

from dataclasses import replace

import torch
import pytest
from transformers import DynamicCache

from emt import MemoryConfig, attach
from emt.errors import ConfigError, UnsupportedModelError
from emt.ingest.carry import FIRST_ROWS, can_carry, check_carry, encode_carrying
from emt.ingest.encoder import Encoder, encode
from emt.ingest.windows import Windows
from tests.emt.ingest.encoding import (
    SLIDING,
    assert_same_rows,
    count_forwards,
    families,
    in_one_forward,
    joined,
    random_ids,
    row_reader,
)
from tests.families import FAMILIES, build

LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("family", families(carrying=True))
def test_nothing_evicted_is_one_plain_forward(family):
    reader, token_ids, windows = row_reader(family.build(), {7, 8}), random_ids(45), Windows(13, 64)
    expected = in_one_forward(reader, token_ids)
    runs = list(encode_carrying(reader, token_ids, windows))
    assert len(runs) == 1
    assert_same_rows(joined(runs), expected, 0)
    runs = list(encode_carrying(reader, token_ids, windows, first_length=10))
    assert len(runs) == 4
    assert_same_rows(joined(runs), expected)


@pytest.mark.parametrize("sliding_window", [2, 9, 30])
@pytest.mark.parametrize("model_type", SLIDING)
def test_sliding_windows_slide_over_the_context(model_type, sliding_window):
    reader = row_reader(build(model_type, sliding_window=sliding_window))
    token_ids = random_ids(45)
    runs = encode_carrying(reader, token_ids, Windows(13, 64), first_length=10)
    assert_same_rows(joined(runs), in_one_forward(reader, token_ids))


@torch.no_grad()
def streaming_llm(model, token_ids, stride, max_length):
    """Feed one token at a time through a stock model; make each window's cache by hand."""
    theta = model.config.rope_parameters["rope_theta"]

    def turn(key, positions):  # (Hkv, n, D)
        half = key.shape[-1] // 2
        angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
        x, y = key[..., :half].double(), key[..., half:].double()
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1).float()

    keys = [[] for _ in model.model.layers]
    values = [[] for _ in model.model.layers]
    start = 0
    for stop in [max_length, *range(max_length + stride, len(token_ids) + stride, stride)]:
        stop = min(stop, len(token_ids))
        room = max_length - (stop - start)
        context = list(range(start))
        if len(context) > room:
            context = context[:FIRST_ROWS] + context[len(context) - (room - FIRST_ROWS) :]
        cache = DynamicCache()
        for idx in range(len(model.model.layers)):
            if context:
                key = torch.stack([keys[idx][token] for token in context], dim=1)
                value = torch.stack([values[idx][token] for token in context], dim=1)
                cache.update(turn(key, torch.arange(len(context)))[None], value[None], idx)
        for at, token in enumerate(range(start, stop)):
            position = len(context) + at
            model(
                token_ids[None, token : token + 1],
                past_key_values=cache,
                position_ids=torch.tensor([[position]]),
            )
            for idx, layer in enumerate(cache.layers):
                at_zero = turn(layer.keys[0][:, -1:], torch.tensor([-position]))
                keys[idx].append(at_zero[:, 0])
                values[idx].append(layer.values[0][:, -1])
        start = stop
    return [[torch.stack(tokens, dim=1) for tokens in part] for part in (keys, values)]


@pytest.mark.parametrize(("stride", "max_length"), [(7, 20), (4, 9), (15, 20)])
def test_evicted_context_is_streaming_llm(stride, max_length):
    model, token_ids = build("llama"), random_ids(50)
    keys, values = streaming_llm(model, token_ids, stride, max_length)
    reader = row_reader(model)
    runs = list(encode_carrying(reader, token_ids, Windows(stride, max_length)))
    assert [len(run) for run in runs][:2] == [max_length, stride]
    tokens, tensors = joined(runs)
    assert tokens == list(range(50))
    for idx in range(3):
        torch.testing.assert_close(tensors["keys", idx], keys[idx], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(tensors["values", idx], values[idx], atol=2e-5, rtol=1e-5)
    whole = in_one_forward(reader, token_ids)[1]
    assert (tensors["values", 2] - whole["values", 2]).abs().max() > 1e-3


@pytest.mark.parametrize("family", families(carrying=True))
def test_evicted_context_is_placed_where_a_text_without_it_would_be(family):
    """Layer 0 has no memory of context, so layer 1 cannot tell the context from such a text."""
    reader, token_ids = row_reader(family.build()), random_ids(47)
    runs = list(encode_carrying(reader, token_ids, Windows(8, 24)))
    assert [len(run) for run in runs] == [24, 8, 8, 7]
    assert_same_rows(joined(runs[:1]), in_one_forward(reader, token_ids[:24]), 0)
    for run, start, recent in zip(runs[1:], (24, 32, 40), (12, 20, 27), strict=True):
        chosen = [*range(FIRST_ROWS), *range(recent, start + len(run))]
        assert len(chosen) == 24
        expected = in_one_forward(reader, token_ids[chosen])[1]
        for (part, idx), tensor in joined([run])[1].items():
            if family.model_type == "gpt2":  # keys keep the positions they were read at
                assert torch.isfinite(tensor).all()
            elif idx < 2:
                torch.testing.assert_close(
                    tensor, expected[part, idx][:, -len(run) :], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("stop", [40, 41, 45])
def test_rope_that_depends_on_the_length_is_the_same_in_every_window(stop):
    """Every window ends at position max_length - 1, the last one too."""
    rope = {"rope_theta": 10000.0, **LONG_ROPE}
    reader = row_reader(build("llama", rope_parameters=rope))
    seen = []
    forward = reader.decoder.rotary_emb.forward

    def spying(x, position_ids, **options):
        embeddings = forward(x, position_ids, **options)
        seen.append((int(position_ids.min()), int(position_ids.max()), embeddings[0]))
        return embeddings

    reader.decoder.rotary_emb.forward = spying
    runs = list(encode_carrying(reader, random_ids(stop), Windows(8, 24)))
    assert sum(len(run) for run in runs) == stop
    (_, _, table), *later = seen
    assert len(later) == len(runs) - 1
    for first, last, cos in later:
        assert last == 23
        torch.testing.assert_close(cos, table[:, first:], atol=1e-6, rtol=0)


def test_rope_that_changes_between_windows_is_refused():
    rope = {"rope_theta": 10000.0, **LONG_ROPE}
    reader = row_reader(build("llama", rope_parameters=rope))
    runs = encode_carrying(reader, random_ids(60), Windows(8, 24))
    next(runs)
    reader.decoder.config.rope_parameters["original_max_position_embeddings"] = 64
    with pytest.raises(UnsupportedModelError, match="rotates positions 16 to 23 differently"):
        list(runs)


def test_what_cannot_be_carried_is_refused():
    config = build("llama").config
    with pytest.raises(ConfigError, match=r"max_length \(12\) .* stride \(8\) \+ 5"):
        check_carry(config, Windows(8, 12))
    check_carry(config, Windows(8, 13))
    config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match=r"layers 0 \(LinearAttentionLayer\) do not"):
        check_carry(config, Windows(8, 24))


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.carries], ids=lambda family: family.model_type
)
def test_caches_that_rows_cannot_fill_are_refused_before_anything_is_read(family):
    reader = row_reader(family.build())
    in_one_forward(reader, random_ids(24))
    with pytest.raises(UnsupportedModelError, match="Set carry_context to false"):
        next(encode_carrying(reader, random_ids(40), Windows(8, 24)))


@pytest.mark.parametrize("family", families())
def test_automatic_context_is_carried_where_that_is_possible(family, monkeypatch):
    reader, token_ids = row_reader(family.build(), {7, 8}), random_ids(45)
    windows = Windows(8, 24, "auto")
    num_read = count_forwards(monkeypatch)
    expected = joined(encode(reader, token_ids, replace(windows, carry_context=family.carries)))
    num_expected = sum(num_read)
    assert_same_rows(joined(encode(reader, token_ids, windows)), expected, 0)
    is_tried = not family.carries and can_carry(reader.decoder.config, windows)
    assert sum(num_read) == 2 * num_expected + is_tried * 24  # the window that shows it


def encoder(config, **options):
    return Encoder(attach(build("llama", **options))._attached("test"), config, None)


def test_automatic_context_is_decided_by_the_config_as_far_as_it_tells():
    auto, room = Windows(8, 24, "auto"), MemoryConfig(stride=8, max_length=24)
    assert encoder(room).windows == auto
    assert encoder(room.replace(stride=19)).windows == replace(auto, stride=19)
    assert encoder(room.replace(stride=20)).windows == Windows(20, 24)  # no room for context
    assert encoder(room, rope_parameters=LONG_ROPE | {"rope_theta": 1e4}).windows == Windows(8, 24)
    for given in (True, False):
        windows = encoder(room.replace(stride=20, carry_context=given)).windows
        assert windows == Windows(20, 24, given)


@pytest.mark.parametrize("family", families())
def test_a_memory_carries_context_unless_it_is_told_not_to(family):
    token_ids, rows = random_ids(45), {}
    settings = {"stride": 8, "max_length": 24, "remove_special_ids": False, "row_codec": "exact"}
    for carry_context in ("auto", family.carries):
        config = MemoryConfig(carry_context=carry_context, **settings)
        memory = attach(family.build(), config)
        memory.write(token_ids, document="d")
        assert len(memory) == 45
        ids = torch.arange(45)
        rows[carry_context] = [
            part
            for idx, layer in memory.backend.layout.layers.items()
            for part in memory.backend.fetch(idx, ids.expand(layer.num_key_value_heads, -1))
        ]
    for found, expected in zip(rows["auto"], rows[family.carries], strict=True):
        assert torch.equal(found, expected)
