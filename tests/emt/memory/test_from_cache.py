"""`Memory.remember`: rows of a cache are those that reading the same tokens makes."""

import copy

import torch
import numpy as np
import pytest
from transformers import DynamicCache, StaticCache

from emt import MemoryConfig, Passage, attach
from emt.errors import DocumentError, MemoryUseError, UnsupportedModelError
from tests.emt.words import word_tokenizer
from tests.families import FAMILIES, VOCAB_SIZE, build
from tests.tiny_models import build_tiny

TOLERANCE = 2e-5
WITHOUT = {"deepseek_v3"}  # it caches what it makes keys and values from


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (1, count), generator=generator)


@torch.no_grad()
def filled(model, token_ids, *, step=7, **options):
    """Return a cache that a model has filled, some tokens at a time."""
    cache = DynamicCache(config=model.config)
    for start in range(0, token_ids.shape[1], step):
        model(token_ids[:, start : start + step], past_key_values=cache, **options)
    return cache


def rows_in(memory, name):
    """Return layer -> keys and values (Hkv, n, D + Dv) of a document."""
    document = memory.backend.catalog.document(name)
    ids = document.first_row + torch.arange(len(document.row_tokens))
    rows = {}
    for idx, layer in memory.backend.layout.layers.items():
        of_heads = ids.expand(layer.num_key_value_heads, 1, -1)
        rows[idx] = torch.cat([part[:, 0] for part in memory.backend.fetch(idx, of_heads)], dim=-1)
    return rows


def read(memory, token_ids):
    """Return layer -> keys and values (Hkv, n, D + Dv) that `Memory.read` makes of tokens."""
    (rows,) = memory.read(token_ids)
    return {idx: torch.cat([rows.keys[idx], rows.values[idx]], dim=-1) for idx in rows.keys}


def assert_same(rows, expected):
    assert list(rows) == list(expected)
    for idx, row in rows.items():
        torch.testing.assert_close(row, expected[idx], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "family", FAMILIES, ids=lambda family: f"{family.model_type}-{family.note}"
)
def test_rows_of_a_cache_are_those_that_reading_makes(family):
    memory = attach(model := family.build())
    token_ids = tokens(40)
    cache = filled(model, token_ids)
    if family.model_type in WITHOUT:
        with pytest.raises(UnsupportedModelError, match="does not keep the keys and values"):
            memory.remember(cache, token_ids, document="chat")
        return
    assert memory.remember(cache, token_ids, document="chat") == range(40)
    assert_same(rows_in(memory, "chat"), read(memory, token_ids))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "glm", "gpt2", "falcon"])
def test_tokens_behind_recalled_rows_are_turned_back_from_where_they_stood(family):
    """Rows recalled inside of a prompt are invisible to tokens before them, not to those after."""
    memory = attach(model := build(family))
    memory.write(tokens(30, seed=1), document="book")
    token_ids = tokens(24)
    with memory.recalling([Passage("book", 4, 20)], at=10):
        cache = filled(model, token_ids, step=24)
    memory.remember(cache, token_ids, document="chat")
    rows, plain = rows_in(memory, "chat"), read(memory, token_ids)
    for idx, row in rows.items():
        torch.testing.assert_close(row[:, :10], plain[idx][:, :10], rtol=0, atol=TOLERANCE)
    first = min(rows)  # a first layer's keys and values depend on their own token only
    if family != "gpt2":  # which adds learned positions to its embeddings
        torch.testing.assert_close(rows[first], plain[first], rtol=0, atol=TOLERANCE)
    last = max(rows)
    assert (rows[last][:, 10:] - plain[last][:, 10:]).abs().max() > 100 * TOLERANCE


def test_rows_behind_recalled_ones_are_those_of_a_prompt_with_that_text():
    """Passages stand as their text would: a whole document at 0 is read before the rest."""
    memory = attach(model := build("llama"))
    book, token_ids = tokens(20, seed=1), tokens(15)
    memory.write(book, document="book")
    with memory.recalling([Passage("book", 0, 20)]):
        cache = filled(model, token_ids, step=15)
    memory.remember(cache, token_ids, document="chat")
    both = read(memory, torch.cat([book, token_ids], dim=1))
    assert_same(rows_in(memory, "chat"), {idx: row[:, 20:] for idx, row in both.items()})


def test_each_sequence_of_a_padded_batch_has_its_own_rows_and_passages():
    memory = attach(model := build("llama"))
    memory.write(tokens(30, seed=1), document="book")
    short, long = tokens(9, seed=2), tokens(14, seed=3)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    both = torch.cat([padded, long])
    passages = [[Passage("book", 2, 8)], [Passage("book", 10, 22)]]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with memory.recalling(passages, at=[3, 5]):
        cache = DynamicCache(config=model.config)
        output = model.generate(both, attention_mask=mask, past_key_values=cache, **options)
    ones = torch.ones(2, output.shape[1] - 14, dtype=torch.long)
    whole = torch.cat([mask, ones], dim=1)
    for sequence, (prompt, passage, at) in enumerate(
        zip((short, long), passages, (3, 5), strict=True)
    ):
        name = f"padded {sequence}"
        memory.remember(
            cache, output[sequence], document=name, sequence=sequence, attention_mask=whole
        )
        alone = DynamicCache(config=model.config)
        with memory.recalling(passage, at=at):
            given = torch.cat([prompt, output[sequence : sequence + 1, 14:-1]], dim=1)
            model(given, past_key_values=alone)
        memory.remember(alone, given, document=f"alone {sequence}")
        assert_same(rows_in(memory, name), rows_in(memory, f"alone {sequence}"))
        # the last token that was chosen has not been run, and padding is no token
        document = memory.backend.catalog.document(name)
        first = 5 if sequence == 0 else 0
        assert document.row_tokens.tolist() == list(range(first, output.shape[1] - 1))


def test_spans_are_one_document_with_their_texts():
    tokenizer = word_tokenizer()
    memory = attach(model := build("llama"), MemoryConfig(special_ids=[50]), tokenizer=tokenizer)
    token_ids = torch.tensor([[5, 6, 7, 8, 50, 9, 10, 11, 12]])
    cache = filled(model, token_ids)
    metadata = {"conversation": "c", "turn": 3}
    ids = memory.remember(
        cache, token_ids, document="chat", spans=[(1, 3), (3, 6), (7, 9)], metadata=metadata
    )
    document = memory.backend.catalog.document("chat")
    assert document.token_ids.tolist() == [6, 7, 8, 50, 9, 11, 12]
    assert document.row_tokens.tolist() == [0, 1, 2, 4, 5, 6]
    assert document.text == "w6 w7\nw8 w50 w9\nw11 w12"
    words = [document.text[start:end].strip() for start, end in document.offsets.tolist()]
    assert words == ["w6", "w7", "w8", "w50", "w9", "w11", "w12"]
    assert document.metadata == metadata
    expected = {idx: row[:, [1, 2, 3, 5, 7, 8]] for idx, row in read(memory, token_ids).items()}
    assert len(ids) == 6
    assert_same(rows_in(memory, "chat"), expected)


def test_only_a_first_token_is_a_sink():
    memory = attach(model := build("llama"))
    token_ids = tokens(12)
    cache = filled(model, token_ids)
    memory.remember(cache, token_ids, document="all")
    memory.remember(cache, token_ids, document="later", spans=[(1, 12)])
    sinks = [memory.backend.catalog.document(name).sink_rows.tolist() for name in ("all", "later")]
    assert sinks == [[0], []]


def test_a_window_that_slid_on_is_refused_and_what_is_in_it_remembered():
    memory = attach(model := build("gemma3_text", sliding_window=16))
    token_ids = tokens(40)
    cache = filled(model, token_ids, step=40)
    with pytest.raises(UnsupportedModelError, match="token 20 has left it"):
        memory.remember(cache, token_ids, document="chat", spans=[(20, 30)])
    memory.remember(cache, token_ids, document="chat", spans=[(25, 40)])
    expected = {idx: row[:, 25:] for idx, row in read(memory, token_ids).items()}
    assert_same(rows_in(memory, "chat"), expected)


def test_caches_that_do_not_keep_what_was_computed_are_refused():
    memory = attach(model := build("llama"))
    token_ids = tokens(6)
    static = StaticCache(config=model.config, max_cache_len=16)
    model(token_ids, past_key_values=static)
    with pytest.raises(UnsupportedModelError, match="this cache has a StaticLayer"):
        memory.remember(static, token_ids, document="chat")
    for cache, got in ((DynamicCache(), "DynamicCache without tokens"), (None, "NoneType")):
        with pytest.raises(MemoryUseError, match=rf"needs the cache .* got {got}"):
            memory.remember(cache, token_ids, document="chat")
    assert memory.documents == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ids": [5, 6]}, "must be the 6 that the cache holds.* got 2 ids"),
        ({"token_ids": list(range(5, 13))}, "got 8 ids"),
        ({"token_ids": [5] * 5 + [VOCAB_SIZE]}, "0 to 96"),
        ({"sequence": 1}, "sequence must be one of the cache's, 0 to 0; got 1"),
        ({"spans": [(2, 4), (3, 5)]}, "must be pairs"),
        ({"spans": [(0, 9)]}, "from 0 to 6"),
        ({"spans": [(-2, 3)]}, "must be pairs"),
        ({"spans": []}, "must be pairs"),
        ({"spans": [3, 4]}, "must be pairs"),
        ({"spans": [(3, 3)]}, "no token to remember"),
        ({"attention_mask": torch.ones(6)}, r"attention_mask must be \(batch, tokens\)"),
        ({"attention_mask": torch.ones(1, 5)}, r"with the 6 tokens of the cache; got \(1, 5\)"),
        ({"attention_mask": torch.zeros(1, 6)}, "no token to remember"),
        ({"document": ""}, "name must be text"),
        ({"document": "taken"}, "taken"),
        ({"metadata": {"a": [1]}}, "metadata"),
    ],
)
def test_what_does_not_fit_the_cache_is_refused_before_anything_changed(options, message):
    memory = attach(model := build("llama"))
    memory.write([5, 6], document="taken")
    token_ids = tokens(6)
    cache = filled(model, token_ids)
    given = {"token_ids": token_ids, "document": "chat", **options}
    with pytest.raises(DocumentError, match=message):
        memory.remember(cache, given.pop("token_ids"), **given)
    assert memory.documents == ["taken"]


def test_a_cache_stays_as_it_was_and_a_name_can_be_used_again():
    memory = attach(model := build("llama"))
    token_ids = tokens(10)
    cache = filled(model, token_ids)
    before = copy.deepcopy(cache)
    memory.remember(cache, token_ids, document="chat", spans=[(0, 4)])
    memory.remember(cache, token_ids, document="chat", spans=[(4, 10)], replace=True)
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys)
    assert memory.documents == ["chat"]
    assert len(memory.backend.catalog.document("chat").row_tokens) == 6
    assert np.array_equal(memory.backend.catalog.document("chat").token_ids, token_ids[0, 4:])


def test_remembering_is_writing():
    memory = attach(model := build("llama"))
    token_ids = tokens(6)
    cache = filled(model, token_ids)
    model.train()
    with pytest.raises(MemoryUseError, match="evaluation mode"):
        memory.remember(cache, token_ids, document="chat")
    model.eval()
    with memory.activity.shared("route"), pytest.raises(MemoryUseError, match="cannot remember"):
        memory.remember(cache, token_ids, document="chat")
    memory.close()
    with pytest.raises(MemoryUseError, match="closed"):
        memory.remember(cache, token_ids, document="chat")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["falcon_h1", "lfm2"])
@torch.no_grad()
def test_layers_with_attention_are_remembered_beside_recurrent_ones(family):
    memory = attach(model := build_tiny(family))
    token_ids = tokens(20)
    cache = model(token_ids, use_cache=True).past_key_values
    memory.remember(cache, token_ids, document="chat")
    assert_same(rows_in(memory, "chat"), read(memory, token_ids))
