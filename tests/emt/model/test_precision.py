"""Half-precision models: rows in the model's dtype, search and softmax as in float64.

Each attention call of a model is compared with `brute_force`, which has the same half-precision
queries, keys and values and computes in float64. What may differ is float32's rounding, and the
one rounding of the output to the model's dtype.
"""

import torch
import numpy as np
import pytest

from emt import MemoryConfig, attach
from emt.errors import MemoryMismatchError
from tests.emt.brute_force import extended_attention
from tests.families import VOCAB_SIZE, build

HALF = [torch.bfloat16, torch.float16]
BACKENDS = {"manual": {}, "vector_db": {"index": "Flat"}}
TOPK, PROMPT_LENGTH, NUM_ROWS = 4, 6, 40
FLOAT32 = 4e-6  # of sums of some dozens of products


def ids(length, seed=3):
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def remembering(model, memory_type="manual", **settings):
    config = MemoryConfig.published(
        memory_type=memory_type, topk=TOPK, **BACKENDS[memory_type], **settings
    )
    memory = attach(model, config)
    memory.write(ids(NUM_ROWS), document="d")
    return memory


def spied(memory):
    """Keep the attention calls that read memories, each with its output."""
    kept, attend = [], memory.attend

    def attend_and_keep(call):
        output, weights = attend(call)
        if call.layer_idx in memory.layers:
            kept.append((call, output.clone()))
        return output, weights

    memory.attend = attend_and_keep
    return kept


def by_brute_force(memory, call):
    """Compute one attention call of a prompt or a step in float64."""
    options, mask = call.options, call.attention_mask
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]

    def visible(b, q, s):
        if mask is None:
            return s <= q + num_keys - num_queries
        seen = mask[b, 0, q, s]
        return bool(seen) if mask.dtype == torch.bool else float(seen) > -1

    rows = torch.arange(NUM_ROWS).expand(call.key.shape[1], -1)
    local = (call.query, call.key, call.value)
    remembered = memory.backend.fetch(call.layer_idx, rows)
    sinks = options.get("s_aux")
    return extended_attention(
        *(part.detach().double().numpy() for part in (*local, *remembered)),
        topk=TOPK,
        scaling=options["scaling"],
        visible=visible,
        softcap=options.get("softcap"),
        sinks=None if sinks is None else sinks.detach().double().numpy(),
    )


def assert_rounded_once(output, expected, values):
    """Allow half a unit in the last place of the dtype, and float32's rounding before it."""
    half_a_unit = torch.finfo(output.dtype).eps / 2
    subnormal = torch.finfo(output.dtype).smallest_normal * torch.finfo(output.dtype).eps
    bound = half_a_unit * np.abs(expected) + FLOAT32 * float(values.abs().max()) + subnormal
    assert (np.abs(output.detach().double().numpy() - expected) <= bound).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("model_type", "memory_type"),
    [
        *((name, "manual") for name in ("llama", "qwen3", "gemma2", "gpt_oss", "gpt2")),
        ("llama", "vector_db"),
    ],
)
def test_attention_is_rounded_once(model_type, memory_type, dtype):
    model = build(model_type, dtype=dtype)
    memory = remembering(model, memory_type)
    calls = spied(memory)
    prompt = torch.stack([ids(PROMPT_LENGTH, 4), ids(PROMPT_LENGTH, 5)])
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0  # left padding
    with memory.recording(whole_prompt=True) as recorded:
        cache = model(prompt, attention_mask=mask).past_key_values
    mask = torch.cat([mask, mask[:, -1:]], dim=1)
    step = ids(2, 6)[:, None]
    model(step, attention_mask=mask, past_key_values=cache)  # not recorded
    assert [call.query.shape[2] for call, _ in calls] == (
        [PROMPT_LENGTH] * len(memory.layers) + [1] * len(memory.layers)
    )
    for call, output in calls:
        assert output.dtype == call.query.dtype == dtype
        expected, rows, scores, weights = by_brute_force(memory, call)
        assert_rounded_once(output.transpose(1, 2), expected, call.value)
        if call.query.shape[2] == PROMPT_LENGTH:
            retrieved = recorded[0][call.layer_idx]
            assert retrieved.ids.tolist() == rows.tolist()
            np.testing.assert_allclose(retrieved.scores.numpy(), scores, atol=FLOAT32)
            np.testing.assert_allclose(retrieved.weights.numpy(), weights, atol=FLOAT32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_store_keeps_every_bit_in_the_models_dtype(model_type, dtype, tmp_path):
    memory = remembering(build(model_type, dtype=dtype), path=str(tmp_path / "store"))
    expected = remembering(build(model_type, dtype=dtype))
    opened = attach(
        build(model_type, dtype=dtype),
        MemoryConfig.published(memory_type="vector_db", index="Flat", path=str(tmp_path / "store")),
    )
    for layer_idx, layer in memory.backend.layout.layers.items():
        rows = torch.arange(NUM_ROWS).expand(layer.num_key_value_heads, -1)
        stored = opened.backend.fetch(layer_idx, rows)
        for tensor, written in zip(stored, expected.backend.fetch(layer_idx, rows), strict=True):
            assert tensor.dtype == dtype
            assert torch.equal(tensor, written)


@torch.no_grad()
def test_a_float64_model_is_refused_and_left_as_it_was():
    model = build("llama").double()
    prompt = ids(6)[None]
    before = model(prompt).logits
    with pytest.raises(MemoryMismatchError, match="rows must be float32, float16 or bfloat16; got"):
        attach(model)
    assert torch.equal(model(prompt).logits, before)
    assert "generate" not in vars(model)
    remembering(model.float())


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "memory_type"),
    [("llama", "manual"), ("llama", "vector_db"), ("gpt_oss", "manual")],
)
def test_autocast_changes_the_models_products_and_not_the_memorys(model_type, memory_type):
    model = build(model_type)
    with torch.autocast("cpu", torch.bfloat16):  # attached and written to with it on
        memory = remembering(model, memory_type)
    plain = remembering(build(model_type))
    for layer_idx in memory.layers:
        rows = torch.arange(NUM_ROWS).expand(2, -1)
        stored = memory.backend.fetch(layer_idx, rows)
        for tensor, written in zip(stored, plain.backend.fetch(layer_idx, rows), strict=True):
            assert torch.equal(tensor, written)
    calls = spied(memory)
    prompt = ids(PROMPT_LENGTH, 4)[None]
    with torch.autocast("cpu", torch.bfloat16), memory.recording(whole_prompt=True) as recorded:
        cache = model(prompt).past_key_values
    with torch.autocast("cpu", torch.bfloat16):
        model(prompt[:, :1], past_key_values=cache)
    for call, output in calls:
        expected, rows, scores, _ = by_brute_force(memory, call)
        assert_rounded_once(output.transpose(1, 2), expected, call.value)
        if call.query.shape[2] == PROMPT_LENGTH:
            retrieved = recorded[0][call.layer_idx]
            assert retrieved.ids.tolist() == rows.tolist()
            np.testing.assert_allclose(retrieved.scores.numpy(), scores, atol=FLOAT32)
