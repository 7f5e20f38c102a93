import math
from types import SimpleNamespace

import torch
import pytest

from emt import attach
from emt.model.rope import (
    Unrotation,
    as_cos_sin,
    find_unrotation,
    rotate_halves,
    rotate_pairs,
)
from emt.model.watch import watching
from tests.families import FAMILIES, build
from tests.tiny_models import build_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn, attention_factor": {**YARN, "attention_factor": 1.7},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@torch.no_grad()
def keys_of(memory, model, token, positions):
    """Return each layer's key of one token alone at each position, brought back to position 0."""
    unrotations = memory._attached("test").unrotations
    at_zero = {idx: [] for idx in unrotations}
    raw = {idx: [] for idx in unrotations}
    for position in positions:
        with watching(model) as seen:
            model(torch.tensor([[token]]), position_ids=torch.tensor([[position]]))
        for call in seen.calls:
            unrotate = unrotations[call.layer_idx]
            key = call.key
            raw[call.layer_idx].append(key)
            if unrotate is not None:
                key = unrotate(key, as_cos_sin(seen.position_embeddings[call.module]))
            at_zero[call.layer_idx].append(key)
    return at_zero, raw


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaled_rope_comes_back_to_the_models_own_key_at_zero(scaling):
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    at_zero, raw = keys_of(attach(model), model, 17, [0, 1, 9, 50])
    for idx, keys in at_zero.items():
        assert (raw[idx][1] - raw[idx][0]).abs().max() > 0.1
        for key in keys:
            torch.testing.assert_close(key, raw[idx][0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.model_type != "gpt2"], ids=lambda f: f.model_type
)
def test_every_family_comes_back_to_its_own_key_at_zero(family):
    model = family.build()
    at_zero, raw = keys_of(attach(model), model, 23, [0, 3, 200])
    for idx, keys in at_zero.items():
        for key in keys:
            torch.testing.assert_close(key, raw[idx][0], atol=1e-5, rtol=1e-4)


def test_layers_without_rotation_are_left_alone():
    kinds = {
        model_type: [
            unrotation is not None
            for unrotation in attach(build(model_type))._attached("test").unrotations.values()
        ]
        for model_type in ("smollm3", "gpt2", "llama")
    }
    assert kinds == {
        "smollm3": [True, False, True],
        "gpt2": [False] * 3,
        "llama": [True] * 3,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "cohere"])
def test_half_precision_models_are_recognised(model_type, dtype):
    model = build(model_type, dtype=dtype)
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "k_proj") and getattr(module.k_proj, "bias", None) is not None:
            module.k_proj.bias[-1] = 300.0  # keys with biases have such outliers
    memory = attach(model)
    unrotations = memory._attached("test").unrotations
    assert [unrotation is not None for unrotation in unrotations.values()] == [True] * 3
    at_zero, raw = keys_of(memory, model, 5, [0, 4])
    for idx, (_, key) in at_zero.items():
        bound = 0.02 * raw[idx][0].abs() + 0.02 * raw[idx][1].abs() + 0.01
        assert ((key - raw[idx][0]).abs() <= bound).all()


def test_a_rotation_that_cannot_be_undone_is_not_found():
    key = torch.randn(1, 2, 1, 8)
    module = build("llama").model.layers[0].self_attn
    embeddings = (torch.full((1, 1, 8), math.cos(1)), torch.full((1, 1, 8), math.sin(1)))
    assert find_unrotation(module, key, torch.randn(1, 2, 1, 8), embeddings, 1e-4) is None
    assert find_unrotation(module, key, key, None, 1e-4) is None
    assert find_unrotation(SimpleNamespace(), key, key, embeddings, 1e-4) is None


def test_the_two_rotations_against_complex_numbers():
    key, angle = torch.randn(1, 2, 5, 8), torch.rand(1, 5, 4) * 6
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (1, 1, 5, 4)
    pairs = torch.view_as_real(torch.view_as_complex(key.view(1, 2, 5, 4, 2)) * turn).flatten(-2)
    halves = torch.complex(key[..., :4], key[..., 4:]) * turn
    halves = torch.cat([halves.real, halves.imag], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    for embeddings in ((cos, sin), (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))):
        torch.testing.assert_close(rotate_halves(key, key, *embeddings)[1], halves)
    for embeddings in ((cos, sin), (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))):
        torch.testing.assert_close(rotate_pairs(key, key, *embeddings)[1], pairs)


def test_the_last_dims_alone_and_a_gain_after_the_rotation():
    key, angle, gain = torch.randn(1, 2, 5, 12), torch.rand(1, 5, 4), 0.5 + torch.rand(12)
    rotated = rotate_halves(key, key[..., 4:], angle.cos(), angle.sin())[1]
    rotated = torch.cat([key[..., :4], rotated], dim=-1) * gain
    unrotate = Unrotation(rotate_halves, 8, is_last=True, gain=gain)
    embeddings = angle.cos(), angle.sin()
    torch.testing.assert_close(unrotate(rotated, embeddings), key * gain)
    torch.testing.assert_close(unrotate.redo(key * gain, embeddings), rotated)


def test_position_embeddings_come_as_pairs_or_complex_numbers():
    angle = torch.rand(1, 5, 4)
    cos, sin = as_cos_sin(torch.polar(torch.ones_like(angle), angle))
    torch.testing.assert_close((cos, sin), (angle.cos(), angle.sin()))
    assert as_cos_sin((cos, sin)) == (cos, sin)
    for other in (None, cos, (cos,), ("cos", "sin")):
        with pytest.raises(TypeError, match="expected cos and sin, or complex numbers"):
            as_cos_sin(other)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("deepseek_v3", (8, True, False)),
        ("llama4_text", (16, False, False)),
        ("hunyuan_v1_dense", (16, False, True)),
        ("gemma4_text", (16, False, False)),
    ],
)
def test_how_a_layer_rotates_is_found(model_type, expected):
    model = build(model_type)
    for name, weight in model.named_parameters():
        if "key_layernorm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    unrotation = attach(model)._attached("test").unrotations[0]
    assert (unrotation.num_rotated, unrotation.is_last, unrotation.gain is not None) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sinks_in_half_precision_do_not_hide_a_rotation(dtype):
    """How much a sink leaves of a value is rounded differently at every position."""
    memory = attach(build_tiny("gpt_oss").to(dtype))
    unrotations = memory._attached("test").unrotations
    assert [unrotation is not None for unrotation in unrotations.values()] == [True] * 4
