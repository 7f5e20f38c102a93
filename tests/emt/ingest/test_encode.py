import torch
import pytest
from transformers import DynamicCache

from emt import MemoryConfig, attach
from emt.errors import ConfigError
from emt.ingest.encode import Window, check_max_length, encode, windows
from emt.ingest.rows import SINK_ROWS
from tests.families import VOCAB_SIZE, build


def slow_windows(num_tokens, stride, max_length):
    """Go through the starts as the published encoder does, marking tokens one by one."""
    done = [False] * num_tokens
    found = []
    start = 0
    while not all(done):
        read = [token for token in range(num_tokens) if start <= token < start + max_length]
        new = [token for token in read if not done[token]]
        for token in new:
            done[token] = True
        found.append((read, new))
        start += stride
    return found


@pytest.mark.parametrize("max_length", range(1, 9))
@pytest.mark.parametrize("stride", range(1, 9))
def test_windows_against_a_slow_enumeration(stride, max_length):
    if max_length < stride:
        with pytest.raises(ConfigError, match="must be at least stride"):
            MemoryConfig(stride=stride, max_length=max_length)
        return
    for num_tokens in range(30):
        found = [
            (list(range(w.start, w.stop)), list(range(w.keep_from, w.stop)))
            for w in windows(num_tokens, stride, max_length)
        ]
        assert found == slow_windows(num_tokens, stride, max_length)


def test_windows_at_the_published_settings():
    assert list(windows(4000, 512, 3072)) == [
        Window(0, 3072, 0),
        Window(512, 3584, 3072),
        Window(1024, 4000, 3584),
    ]


def unrotated(key, theta):
    """Turn each pair of dims of keys (Hkv, n, D) at positions 0.. back by its own angle."""
    _, num_tokens, dim = key.shape
    back = torch.empty_like(key)
    for position in range(num_tokens):
        for pair in range(dim // 2):
            angle = torch.tensor(position * theta ** (-2 * pair / dim))
            x, y = key[:, position, pair], key[:, position, pair + dim // 2]
            back[:, position, pair] = x * angle.cos() + y * angle.sin()
            back[:, position, pair + dim // 2] = y * angle.cos() - x * angle.sin()
    return back


@torch.no_grad()
@pytest.mark.parametrize(("stride", "max_length"), [(4, 10), (5, 5), (40, 40)])
def test_rows_are_the_stock_models_cache_turned_back(stride, max_length):
    stock = build("llama").double().float()
    model = build("llama")
    theta = stock.config.rope_parameters["rope_theta"]
    token_ids = torch.randint(0, VOCAB_SIZE, (23,))
    attached = attach(model)._attached("test")
    runs = list(
        encode(
            attached.decoder(),
            token_ids,
            stride=stride,
            max_length=max_length,
            unrotations=attached.unrotations,
        )
    )
    assert torch.equal(
        torch.cat([torch.from_numpy(run.tokens) for run in runs]), torch.arange(23).int()
    )
    for run, (read, new) in zip(runs, slow_windows(23, stride, max_length), strict=True):
        cache = DynamicCache()
        stock(token_ids[read][None], past_key_values=cache)
        kept = [token - read[0] for token in new]
        assert run.tokens.tolist() == new
        assert run.sinks.tolist() == [position < SINK_ROWS for position in kept]
        for idx, layer in enumerate(cache.layers):
            expected = unrotated(layer.keys[0], theta)[:, kept]
            torch.testing.assert_close(run.keys[idx], expected, atol=5e-6, rtol=0)
            torch.testing.assert_close(run.values[idx], layer.values[0][:, kept], atol=0, rtol=0)


def test_dropped_ids_leave_no_row_but_were_attended_to():
    model = build("llama")
    attached = attach(model)._attached("test")
    token_ids = torch.tensor([1, 50, 51, 2, 52, 1])

    def rows(drop_ids):
        (run,) = encode(
            attached.decoder(),
            token_ids,
            stride=6,
            max_length=6,
            unrotations=attached.unrotations,
            drop_ids=drop_ids,
        )
        return run

    everything, some = rows(()), rows({1, 2})
    assert some.tokens.tolist() == [1, 2, 4]
    assert some.sinks.tolist() == [True, True, False]
    for idx in everything.keys:
        assert torch.equal(some.keys[idx], everything.keys[idx][:, [1, 2, 4]])
        assert torch.equal(some.values[idx], everything.values[idx][:, [1, 2, 4]])


def test_encoding_ignores_the_memory():
    model = build("llama")
    memory = attach(model)
    ids = list(range(10, 30))
    first, second = memory.write(ids, document="one"), memory.write(ids, document="two")
    for idx in memory.backend.layout.layers:
        one, two = (
            memory.backend.fetch(idx, torch.tensor([list(rows)] * 2)) for rows in (first, second)
        )
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_windows_longer_than_the_model_are_refused():
    config = build("llama", max_position_embeddings=64).config
    with pytest.raises(ConfigError, match=r"max_length \(65\) must be at most the model's 64"):
        check_max_length(config, 65)
    check_max_length(config, 64)
    with pytest.raises(ConfigError, match=r"max_length \(65\) must be at most the model's 64"):
        check_max_length(build("mpt", max_seq_len=64).config, 65)
    check_max_length(build("bloom").config, 10**6)
