import json

import torch
import numpy as np
import pytest

from emt import attach
from emt.model.identity import identity_of, sketch_of
from memory_backends.store.sketch import Sketch
from tests.emt.words import word_tokenizer
from tests.families import build


def identity(model, tokenizer=None):
    memory = attach(model)
    return identity_of(model, model.get_decoder(), memory.backend.layout, tokenizer)


def test_describes_a_model_in_plain_types():
    described = identity(build("llama"), word_tokenizer())
    assert json.loads(json.dumps(described)) == described
    assert Sketch.from_json(described.pop("sketch")).num_layers == 3
    hashes = [described.pop(name) for name in ("weights", "tokenizer")]
    assert [len(digest) for digest in hashes] == [16, 16]
    assert described == {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "dtype": "float32",
        "rope": {"rope_theta": 10000.0, "rope_type": "default"},
    }


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"num_hidden_layers": 2}, {"num_hidden_layers", "weights", "sketch"}),
        ({"num_key_value_heads": 4}, {"num_key_value_heads", "weights", "sketch"}),
        ({"head_dim": 8}, {"head_dim", "weights", "sketch"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope"}),
        ({"dtype": torch.bfloat16}, {"dtype", "weights", "sketch"}),
    ],
    ids=["layers", "heads", "head_dim", "rope", "dtype"],
)
def test_every_difference_shows_in_its_field(other, differs):
    assert differing(identity(build("llama")), identity(build("llama", **other))) == differs


def test_families_differ_in_type():
    assert identity(build("qwen2"))["model_type"] == "qwen2"


def differing(identity, other):
    return {key for key in identity if identity[key] != other[key]}


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.up_proj", "lm_head"])
def test_a_small_step_of_training_shows(name):
    model = build("llama")
    layout = attach(model).backend.layout
    before = identity_of(model, model.get_decoder(), layout, None)
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(1.001)
    after = identity_of(model, model.get_decoder(), layout, None)
    assert differing(before, after) == {"weights", "sketch"}


def test_a_sketch_names_weights_as_the_decoder_does():
    model = build("gemma3_text")
    plain = sketch_of(model, model.get_decoder())
    inside = torch.nn.ModuleDict({"language_model": model.get_decoder()})
    outer = torch.nn.Module()
    outer.model, outer.vision = inside, torch.nn.Linear(5, 5)
    other = sketch_of(outer, model.get_decoder())
    assert len(np.setdiff1d(plain.names, other.names)) == 1 - model.config.tie_word_embeddings
    assert len(np.setdiff1d(other.names, plain.names)) == 2  # the other part's
    assert other.correlation(plain) == pytest.approx(1)
    compiled = torch.nn.Module()  # what torch.compile puts around a module
    compiled._orig_mod = model.model.layers[0]
    model.model.layers[0] = compiled
    assert sketch_of(model, model.get_decoder()).to_json() == plain.to_json()


def test_a_sketch_has_values_of_the_weights_by_the_golden_ratio():
    model = build("llama")
    weights = dict(model.named_parameters())
    made = sketch_of(model, model.get_decoder())
    assert (made.model_type, made.num_layers, len(made.names)) == ("llama", 3, len(weights))
    values = {
        tuple(
            weight.flatten()[int(i * 0.6180339887498949 % 1 * weight.numel())].item()
            for i in range(1, 9)
        )
        for weight in weights.values()
    }
    assert {tuple(row) for row in made.values.tolist()} == values


def test_another_vocabulary_shows():
    before = identity(build("llama"), word_tokenizer())
    after = identity(build("llama"), word_tokenizer(shift=1))
    assert differing(before, after) == {"tokenizer"}
