"""Carried context against one plain forward, and against StreamingLLM written out by hand."""

import torch
import pytest
from transformers import DynamicCache

from emt import MemoryConfig, attach
from emt.errors import ConfigError, UnsupportedModelError
from emt.ingest.carry import check_carry, read_carrying
from emt.ingest.encode import encode
from emt.ingest.rows import SINK_ROWS, Reader
from tests.families import FAMILIES, VOCAB_SIZE, build

TOLERANCE = 1e-5
CARRYING = [family for family in FAMILIES if family.carries]
SLIDING = ["mistral", "gemma2", "gemma3_text", "gpt_oss"]
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 16,
}


def reader(model, drop_ids=()):
    attached = attach(model, MemoryConfig(layers=[0]))._attached("test")
    return Reader(attached.decoder(), attached.unrotations, drop_ids)


def words(count):
    torch.manual_seed(3)
    return torch.randint(3, VOCAB_SIZE, (count,))


def joined(runs):
    """Put the runs of a document together, part by part."""
    runs = list(runs)
    parts = [
        {idx: torch.cat([getattr(run, part)[idx] for run in runs], dim=1) for idx in runs[0].keys}
        for part in ("keys", "values", "queries")
    ]
    tokens = [token for run in runs for token in run.tokens.tolist()]
    return parts, tokens, [sink for run in runs for sink in run.sinks.tolist()]


def assert_same(found, expected, tolerance=TOLERANCE):
    assert found[1:] == expected[1:]
    for mine, other in zip(found[0], expected[0], strict=True):
        for idx in other:
            torch.testing.assert_close(mine[idx], other[idx], atol=tolerance, rtol=tolerance)


def plain(read, token_ids):
    """One forward over everything."""
    length = len(token_ids)
    return joined(
        encode(
            read.decoder,
            token_ids,
            stride=length,
            max_length=length,
            unrotations=read.unrotations,
            drop_ids=read.drop_ids,
        )
    )


@pytest.mark.parametrize("family", CARRYING, ids=lambda family: family.model_type)
def test_nothing_evicted_is_one_plain_forward(family):
    read, token_ids = reader(family.build(), {7, 8}), words(45)
    expected = plain(read, token_ids)
    runs = list(read_carrying(read, token_ids, stride=13, max_length=64))
    assert len(runs) == 1
    assert_same(joined(runs), expected, 0)
    runs = list(read_carrying(read, token_ids, stride=13, max_length=64, first_length=10))
    assert len(runs) == 4
    assert_same(joined(runs), expected)


@pytest.mark.parametrize("sliding_window", [2, 9, 30])
@pytest.mark.parametrize("model_type", SLIDING)
def test_sliding_windows_slide_over_the_context(model_type, sliding_window):
    read, token_ids = reader(build(model_type, sliding_window=sliding_window)), words(45)
    runs = read_carrying(read, token_ids, stride=13, max_length=64, first_length=10)
    assert_same(joined(runs), plain(read, token_ids))


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
            context = context[:SINK_ROWS] + context[len(context) - (room - SINK_ROWS) :]
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
    token_ids = words(50)
    keys, values = streaming_llm(build("llama"), token_ids, stride, max_length)
    read = reader(build("llama"))
    runs = list(read_carrying(read, token_ids, stride=stride, max_length=max_length))
    parts, tokens, sinks = joined(runs)
    assert [len(run) for run in runs][:2] == [max_length, stride]
    assert tokens == list(range(50))
    assert sinks == [token < SINK_ROWS for token in range(50)]
    for idx in range(3):
        torch.testing.assert_close(parts[0][idx], keys[idx], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(parts[1][idx], values[idx], atol=2e-5, rtol=1e-5)
    assert (parts[1][2] - plain(reader(build("llama")), token_ids)[0][1][2]).abs().max() > 1e-3


@pytest.mark.parametrize("family", CARRYING, ids=lambda family: family.model_type)
def test_evicted_context_is_placed_where_a_text_without_it_would_be(family):
    """Layer 0 has no memory of context, so layer 1 cannot tell the context from such a text."""
    read, token_ids = reader(family.build()), words(47)
    runs = list(read_carrying(read, token_ids, stride=8, max_length=24))
    assert [len(run) for run in runs] == [24, 8, 8, 7]
    assert_same(joined(runs[:1]), plain(read, token_ids[:24]), 0)
    for run, start, recent in zip(runs[1:], (24, 32, 40), (12, 20, 27), strict=True):
        chosen = [*range(SINK_ROWS), *range(recent, start + len(run))]
        assert len(chosen) == 24
        expected = plain(read, token_ids[chosen])[0]
        for part, other in zip((run.keys, run.values, run.queries), expected, strict=True):
            for idx in (0, 1):
                mine, theirs = part[idx], other[idx][:, -len(run) :]
                if family.model_type == "gpt2":  # keys keep the positions they were read at
                    assert torch.isfinite(mine).all()
                else:
                    torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("stop", [40, 41, 45])
def test_rope_that_depends_on_the_length_is_the_same_in_every_window(stop):
    """Every window ends at position max_length - 1, the last one too."""
    rope = {"rope_theta": 10000.0, **LONG_ROPE}
    read = reader(build("llama", rope_parameters=rope))
    seen = []
    forward = read.decoder.rotary_emb.forward

    def spying(x, position_ids, **options):
        found = forward(x, position_ids, **options)
        seen.append((int(position_ids.min()), int(position_ids.max()), found[0]))
        return found

    read.decoder.rotary_emb.forward = spying
    runs = list(read_carrying(read, words(stop), stride=8, max_length=24))
    assert sum(len(run) for run in runs) == stop
    (_, _, table), *later = seen
    assert len(later) == len(runs) - 1
    for first, last, cos in later:
        assert last == 23
        torch.testing.assert_close(cos, table[:, first:], atol=1e-6, rtol=0)


def test_rope_that_changes_between_windows_is_refused():
    rope = {"rope_theta": 10000.0, **LONG_ROPE}
    read = reader(build("llama", rope_parameters=rope))
    runs = read_carrying(read, words(60), stride=8, max_length=24)
    next(runs)
    read.decoder.config.rope_parameters["original_max_position_embeddings"] = 64
    with pytest.raises(UnsupportedModelError, match="rotates positions 16 to 23 differently"):
        list(runs)


def test_what_cannot_be_carried_is_refused():
    config = build("llama").config
    with pytest.raises(ConfigError, match=r"max_length \(12\) must be at least stride \(8\) \+ 5"):
        check_carry(config, 8, 12)
    check_carry(config, 8, 13)
    config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match=r"layers 0 \(LinearAttentionLayer\) do not"):
        check_carry(config, 8, 24)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.carries], ids=lambda family: family.model_type
)
def test_caches_that_rows_cannot_fill_are_refused_before_anything_is_read(family):
    read = reader(family.build())
    plain(read, words(24))
    with pytest.raises(UnsupportedModelError, match="Set carry_context to false"):
        next(read_carrying(read, words(40), stride=8, max_length=24))
