"""One real model: from its original file, in other dtypes, quantised. One profile, one store."""

import copy
import logging

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.model.identity import sketch_of
from emt.profiles.choice import known_profiles, shipped_profiles
from tests.model.test_gemma3 import DOCUMENTS

pytestmark = pytest.mark.model

QUESTION = "What is the name of the harbour master's dog?"


@pytest.fixture
def half(smollm2):
    """The model in bfloat16."""
    return copy.deepcopy(smollm2.model).to(torch.bfloat16)


@torch.no_grad()
def changed(model, change):
    """Change the matrices of a copy of the model."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(change(parameter))
    return model


def in_four_bits(weight):
    """Quantise blocks of 32 weights to four bits, and back."""
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / step.clamp(min=1e-12)).round() * step).view_as(weight)


def profiles_of(model):
    return known_profiles(sketch_of(model, model.get_decoder()))


def test_every_form_of_the_model_has_the_profile_that_ships(smollm2, half):
    (shipped,) = [known for known in shipped_profiles() if known.model.startswith("SmolLM2-135M")]
    for model in (smollm2.model, half):  # read from a .gguf, in float32; and in bfloat16
        assert attach(model).profile is shipped
        detach(model)
    assert profiles_of(changed(half, in_four_bits)) == [shipped]
    tuned = changed(smollm2.model, lambda w: w + 0.05 * w.std() * torch.randn_like(w))
    assert profiles_of(tuned) == [shipped]
    other = changed(smollm2.model, lambda w: w[torch.randperm(len(w))])
    assert profiles_of(other) == []


def test_a_store_of_either_dtype_routes_a_question_to_the_same_passages(
    smollm2, half, tmp_path, caplog
):
    routed = {}
    caplog.set_level(logging.WARNING)
    for writer, path in ((smollm2.model, tmp_path / "single"), (half, tmp_path / "half")):
        for model in (writer, *({smollm2.model, half} - {writer})):
            config = MemoryConfig.published(mode="passage", path=path)
            memory = attach(model, config, tokenizer=smollm2.tokenizer)
            memory.write_all(DOCUMENTS.items())
            passages = memory.route(QUESTION).passages
            routed[path.name, model.dtype] = [part.passage for part in passages]
            memory.close()
            detach(model)
    expected = routed["single", torch.float32]
    assert expected
    assert {document.document for document in expected} <= DOCUMENTS.keys()
    assert all(passages == expected for passages in routed.values())
    assert sum("its rows are converted" in record.getMessage() for record in caplog.records) == 2
