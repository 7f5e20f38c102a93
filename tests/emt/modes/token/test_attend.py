import torch
import numpy as np
import pytest

from emt import MemoryConfig, attach
from emt.errors import UnsupportedModelError
from emt.model.attention_call import AttentionCall
from emt.model.watch import watching
from memory_backends import (
    Document,
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    Rows,
)
from tests.emt.brute_force import extended_attention
from tests.emt.modes.token.attending import attend
from tests.families import VOCAB_SIZE, build

B, H, HKV, Q, S, D, DV, ROWS, LAYER = 2, 6, 2, 5, 9, 8, 4, 30, 3


def backend(memory_type, num_rows=ROWS, **options):
    """Return a backend with one layer of random rows, and those rows."""
    layout = MemoryLayout({LAYER: LayerLayout(HKV, D, DV)}, torch.float32)
    made = MemoryBackend(layout, memory_type, **options)
    keys, values = torch.randn(HKV, num_rows, D), torch.randn(HKV, num_rows, DV)
    made.add(
        Document("d", np.arange(num_rows, dtype=np.int32)),
        [Rows.of({LAYER: keys}, {LAYER: values})],
    )
    return made, {"memory_key": keys, "memory_value": values}


def attention_call(*, num_queries=Q, mask=None, **options):
    module = torch.nn.Module()
    module.layer_idx = LAYER
    shapes = (B, H, num_queries, D), (B, HKV, S, D), (B, HKV, S, DV)
    query, key, value = (torch.randn(shape) for shape in shapes)
    return AttentionCall(module, query, key, value, mask, options, lambda *_: (query, None))


def assert_as_brute_force(call, rows, found, *, visible, topk, tolerance=2e-6, **options):
    output, retrieved, _ = found
    expected, ids, scores, weights = extended_attention(
        call.query, call.key, call.value, **rows, topk=topk, visible=visible, **options
    )
    assert retrieved.layer_idx == LAYER
    assert retrieved.ids.tolist() == ids.tolist()
    np.testing.assert_allclose(retrieved.scores.numpy(), scores, atol=tolerance)
    np.testing.assert_allclose(retrieved.weights.numpy(), weights, atol=tolerance)
    np.testing.assert_allclose(output.transpose(1, 2).numpy(), expected, atol=tolerance)


def causal_at_the_end(b, q, s):
    return s <= q + S - Q


def padded(b, q, s):
    return causal_at_the_end(b, q, s) and s >= 3 * b


def mask_of(visible):
    return torch.tensor(
        [[[[visible(b, q, s) for s in range(S)] for q in range(Q)]] for b in range(B)]
    )


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26], ids=["1 query", "few", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {"scaling": 0.3},
        {"scaling": 0.3, "softcap": 0.5},
        {"scaling": 1.1, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -4.0])},
        {},
    ],
    ids=["scaling", "softcap", "sinks", "no scaling"],
)
def test_against_brute_force(memory_type, chunk_bytes, options, monkeypatch):
    monkeypatch.setattr("emt.model.attention_call._CHUNK_BYTES", chunk_bytes)
    made, rows = backend(memory_type)
    call = attention_call(mask=mask_of(padded), **options)
    found = attend(call, made, MemoryConfig.published(topk=4))
    assert_as_brute_force(
        call,
        rows,
        found,
        visible=padded,
        topk=4,
        scaling=options.get("scaling", D**-0.5),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_topk_above_the_rows_takes_them_all(memory_type, chunk_bytes, monkeypatch):
    monkeypatch.setattr("emt.model.attention_call._CHUNK_BYTES", chunk_bytes)
    made, rows = backend(memory_type, num_rows=3)
    call = attention_call(mask=mask_of(padded), scaling=0.3)
    found = attend(call, made, MemoryConfig.published(topk=50))
    assert found[1].ids.shape[-1] == 3
    assert_as_brute_force(call, rows, found, visible=padded, topk=3, scaling=0.3)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26])
@pytest.mark.parametrize("visible", [padded, None], ids=["padded", "causal"])
def test_attention_weights_are_the_whole_softmax(visible, chunk_bytes, monkeypatch):
    monkeypatch.setattr("emt.model.attention_call._CHUNK_BYTES", chunk_bytes)
    made, rows = backend("manual")
    call = attention_call(mask=None if visible is None else mask_of(visible), scaling=0.3)
    num_keys = call.key.shape[2]
    found = attend(call, made, MemoryConfig.published(topk=4), needs_weights=True)
    assert found.weights.shape == (B, H, Q, Q * 4 + num_keys)
    np.testing.assert_allclose(found.weights.sum(-1).numpy(), 1, atol=1e-6)
    group = H // call.value.shape[1]
    for b, h, q in np.ndindex(B, H, Q):
        memories, local = found.weights[b, h, q].split([Q * 4, num_keys])
        others = torch.cat([memories[: q * 4], memories[(q + 1) * 4 :]])
        assert not others.any()
        ids = found.retrieved.ids[b, h, q]
        values = rows["memory_value"][h // group][ids]
        output = memories[q * 4 : (q + 1) * 4] @ values + local @ call.value[b, h // group]
        np.testing.assert_allclose(output.numpy(), found.output[b, q, h].numpy(), atol=2e-6)
    without = attend(call, made, MemoryConfig.published(topk=4))
    assert without.weights is None
    np.testing.assert_allclose(found.output.numpy(), without.output.numpy(), atol=2e-6)


@pytest.mark.parametrize("threshold", [-1.0, 0.25, 0.6, 1.0])
def test_mask_by_sim_leaves_out_what_is_not_similar(threshold):
    made, rows = backend("manual")
    call = attention_call(mask=mask_of(padded), scaling=0.3)
    config = MemoryConfig.published(topk=6, mask_by_sim=True, sim_threshold=threshold)
    found = attend(call, made, config)
    assert_as_brute_force(
        call, rows, found, visible=padded, topk=6, scaling=0.3, threshold=threshold
    )


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26])
def test_no_mask_is_causal_from_the_first_key(chunk_bytes, monkeypatch):
    monkeypatch.setattr("emt.model.attention_call._CHUNK_BYTES", chunk_bytes)
    made, rows = backend("manual")
    call = attention_call(scaling=0.3)
    found = attend(call, made, MemoryConfig.published(topk=4))
    assert_as_brute_force(call, rows, found, visible=lambda b, q, s: s <= q, topk=4, scaling=0.3)


@pytest.mark.parametrize("num_queries", [1, Q])
def test_no_mask_is_all_keys_for_one_query_or_without_causality(num_queries):
    made, rows = backend("manual")
    options = {} if num_queries == 1 else {"is_causal": False}
    call = attention_call(num_queries=num_queries, scaling=0.3, **options)
    found = attend(call, made, MemoryConfig.published(topk=4))
    assert_as_brute_force(call, rows, found, visible=lambda b, q, s: True, topk=4, scaling=0.3)


def test_masks_longer_than_the_keys_are_cut():
    made, rows = backend("manual")
    mask = torch.cat([mask_of(padded), torch.ones(B, 1, Q, 5, dtype=torch.bool)], dim=-1)
    call = attention_call(mask=mask, scaling=0.3)
    found = attend(call, made, MemoryConfig.published(topk=4))
    assert_as_brute_force(call, rows, found, visible=padded, topk=4, scaling=0.3)


@pytest.mark.parametrize("option", ["position_bias", "cache"])
def test_calls_that_do_more_than_attend_are_refused(option):
    made, _ = backend("manual")
    call = attention_call(**{option: torch.zeros(1)})
    with pytest.raises(UnsupportedModelError, match=rf"'{option}' \(layer {LAYER}\)"):
        attend(call, made, MemoryConfig.published())


@torch.no_grad()
@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_a_whole_one_layer_model_against_brute_force(model_type, memory_type):
    """Ids, scores, weights and logits of a left-padded batch, from the model's own projections."""
    layer_types = {"layer_types": ["full_attention"]} if model_type == "gpt_oss" else {}
    model = build(model_type, num_hidden_layers=1, **layer_types)
    memory = attach(model, MemoryConfig.published(memory_type=memory_type, index="Flat", topk=5))
    distinct = torch.randperm(VOCAB_SIZE - 3)[:50] + 3  # in one layer, equal tokens are equal rows
    memory.write(distinct, document="d")
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 8))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    with memory.recording(whole_prompt=True) as recorded:
        logits = model(input_ids, attention_mask=attention_mask).logits
    with watching(model) as seen:
        model(input_ids, attention_mask=attention_mask)
    (call,) = seen.calls
    memory_key, memory_value = memory.backend.fetch(0, torch.arange(50).expand(2, -1))
    sinks = call.options.get("s_aux")
    output, ids, scores, weights = extended_attention(
        call.query,
        call.key,
        call.value,
        memory_key,
        memory_value,
        topk=5,
        scaling=call.options["scaling"],
        visible=lambda b, q, s: s <= q and (b == 0 or s >= 3),
        sinks=sinks,
    )
    real = attention_mask.bool()  # (B, Q): what padding retrieves does not matter
    found = recorded[0][0]
    for part, expected in ((found.ids, ids), (found.scores, scores), (found.weights, weights)):
        difference = np.abs(part.double().numpy() - expected).max((1, 3))
        assert difference[real.numpy()].max() <= 5e-6

    module = call.module
    output = torch.from_numpy(output).float().transpose(1, 2)  # (B, Q, H, D)
    handle = module.o_proj.register_forward_pre_hook(lambda *_: (output.flatten(2),))
    with memory.using(enabled=False):
        expected = model(input_ids, attention_mask=attention_mask).logits
        handle.remove()
        stock = model(input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(logits[real], expected[real], atol=2e-5, rtol=0)
    assert (logits[real] - stock[real]).abs().max() > 1e-2
