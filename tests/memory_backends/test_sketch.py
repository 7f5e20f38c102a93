"""Sketches of weights: the same ones in another dtype, the same model in another form, others."""

import json

import torch
import numpy as np
import pytest

from memory_backends.errors import MemoryMismatchError
from memory_backends.store.sketch import Sketch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUM_LAYERS = 6


def weights(seed=0):
    """Return made-up weights of a model by name; those of norms are near one."""
    torch.manual_seed(seed)
    made = {"embed": torch.randn(300, 64)}
    for layer in range(NUM_LAYERS):
        made[f"{layer}.q"] = torch.randn(64, 64) / 8
        made[f"{layer}.small"] = 1e-6 * torch.randn(64)  # float16 has no more than 24 steps there
        made[f"{layer}.norm"] = 1 + 0.2 * torch.randn(64)
    return made


def sketch(tensors, model_type="llama", num_layers=NUM_LAYERS):
    return Sketch.of(model_type, num_layers, tensors.items())


def changed(tensors, change, only=""):
    return {name: change(tensor) if only in name else tensor for name, tensor in tensors.items()}


def in_blocks(tensor, bits):
    """Quantise blocks of 32 numbers to integers of so many bits, and back."""
    if tensor.ndim < 2:
        return tensor
    blocks = tensor.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((blocks / step).round() * step).view_as(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_the_same_weights_in_two_dtypes(dtype, other):
    made = weights()
    one, two = (sketch(changed(made, lambda t, to=to: t.to(to))) for to in (dtype, other))
    assert one.is_same(two, dtype, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_a_checkpoint_in_half_precision_in_two_dtypes(dtype, other):
    for saved in DTYPES:
        made = changed(weights(), lambda t, saved=saved: t.to(saved))
        one, two = (sketch(changed(made, lambda t, to=to: t.to(to))) for to in (dtype, other))
        assert one.is_same(two, dtype, other)


@pytest.mark.parametrize("only", ["embed", "3.q", "5.norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_one_trained_weight_shows_in_every_dtype(only, dtype, other):
    made = weights()
    trained = changed(made, lambda t: t * 1.02, only)
    one, two = (
        sketch(changed(made, lambda t: t.to(dtype))),
        sketch(changed(trained, lambda t: t.to(other))),
    )
    assert not one.is_same(two, dtype, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda made: {**made, "extra": torch.ones(3)},
        lambda made: {name: made[name] for name in list(made)[1:]},
        lambda made: {**made, "embed": made["embed"].T.contiguous()},
        lambda made: {**made, "embed": (made["embed"] * 10).to(torch.int8)},
    ],
    ids=["one more", "one less", "another shape", "packed"],
)
def test_other_weights_are_not_the_same(change):
    made = weights()
    other = sketch(change(made))
    assert not sketch(made).is_same(other, torch.float32, torch.bfloat16)
    assert not other.is_same(sketch(made), torch.float32, torch.bfloat16)


def test_the_correlation_is_the_mean_of_each_weights():
    one, two = sketch(weights()), sketch(changed(weights(), lambda t: t + t.std() * t.cos()))
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(one.values, two.values, strict=True)]
    assert len(each) == 1 + 3 * NUM_LAYERS
    assert one.correlation(two) == pytest.approx(np.mean(each), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [
        (lambda t: t.bfloat16(), 0.9999, 1.0001),
        (lambda t: t.half(), 0.99, 1.0001),
        (lambda t: in_blocks(t, 8), 0.9999, 1.0001),
        (lambda t: in_blocks(t, 4), 0.98, 0.9999),
        (lambda t: in_blocks(t, 3), 0.96, 0.997),
        (lambda t: t + 0.05 * t.std() * torch.randn_like(t), 0.99, 0.9999),
        (lambda t: 3 * t - 1, 0.9999, 1.0001),
        (lambda t: -t, -1.0001, -0.9999),
        (torch.randn_like, -0.3, 0.3),
        (lambda t: t.flip(0), -0.3, 0.3),
    ],
    ids=["bf16", "f16", "8 bit", "4 bit", "3 bit", "tuned", "scaled", "neg", "other", "moved"],
)
def test_how_alike_models_are(change, least, most):
    assert least <= sketch(weights()).correlation(sketch(changed(weights(), change))) <= most


def test_what_is_not_compared():
    made = weights()
    packed = changed(made, lambda t: (t * 10).to(torch.int8), "q")  # of the same shape
    assert sketch(made).correlation(sketch(packed)) == pytest.approx(1)
    ones = changed(made, torch.ones_like, "norm")
    assert sketch(ones).correlation(sketch(ones)) == pytest.approx(1)
    assert sketch(made).correlation(sketch(ones)) == pytest.approx(13 / 19)  # six say nothing
    assert sketch(made).correlation(sketch(made, "qwen2")) == 0
    assert sketch(made).correlation(sketch(made, num_layers=7)) == 0
    few = {name: made[name] for name in ("embed", "0.q", "1.q")}
    assert sketch(made).correlation(sketch(few)) == 0
    assert sketch(made).correlation(sketch({"else": torch.randn(9)})) == 0


def test_there_and_back():
    made = sketch(weights())
    data = json.loads(json.dumps(made.to_json()))
    read = Sketch.from_json(data)
    assert read.to_json() == data
    assert (read.model_type, read.num_layers) == ("llama", NUM_LAYERS)
    assert torch.equal(read.values, made.values)
    assert len(json.dumps(data)) < 60 * len(weights()) + 200


@pytest.mark.parametrize(
    "change",
    [
        lambda data: None,
        lambda data: [],
        lambda data: {},
        lambda data: {**data, "names": "?"},
        lambda data: {**data, "values": data["names"]},
        lambda data: {**data, "values": 3},
        lambda data: {**data, "num_layers": "many"},
        lambda data: {**data, "num_layers": float("inf")},
    ],
)
def test_what_is_no_sketch(change):
    with pytest.raises(MemoryMismatchError, match="not a sketch of weights"):
        Sketch.from_json(change(sketch(weights()).to_json()))


def test_weights_of_few_values_and_strided_ones():
    for tensor in (torch.empty(0), torch.ones(1), torch.tensor(2.0), torch.arange(3.0)):
        made = sketch({"w": tensor})
        assert made.values.shape == (1, 8)
        assert set(made.values.flatten().tolist()) <= {*tensor.flatten().tolist(), 0.0}
    matrix = torch.randn(40, 30)
    strided = matrix.T.contiguous().T
    assert torch.equal(sketch({"w": strided}).values, sketch({"w": matrix}).values)
