"""What a memory asks of the model it is attached to."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import ConfigError, MemoryUseError
from emt.model import positions
from emt.model.attached import reading_layers
from emt.model.references import alive
from tests.families import build, let_go_of_models


def test_angles_are_made_once_for_all_threads(monkeypatch):
    model = build("smollm3")  # its second layer rotates nothing
    attached = attach(model)._attached("test")
    runs, run = [], positions._run
    monkeypatch.setattr(positions, "_run", lambda *args: runs.append(args) or run(*args))
    start = threading.Barrier(4)

    def angles(_):
        start.wait()
        return attached.angles

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(angles, range(4)))
    assert len(runs) == 1
    assert all(angles is made[0] for angles in made)
    places = torch.tensor([[0, 3, 70]])
    embeddings = made[0].at(places)
    assert sorted(embeddings) == [0, 2]
    cos, sin = model.model.rotary_emb(torch.zeros(1), places)
    assert torch.equal(embeddings[2][0], cos)
    assert torch.equal(embeddings[2][1], sin)


def test_a_model_that_is_gone_is_named_with_what_it_was_needed_for():
    attached = attach(build("llama"))._attached("test")
    assert alive(attached.model, "write").get_decoder() is alive(attached.decoder, "write")
    let_go_of_models()
    gc.collect()
    with pytest.raises(MemoryUseError, match="cannot write: the model is gone"):
        alive(attached.model, "write")
    with pytest.raises(MemoryUseError, match="cannot recall: the model is gone"):
        _ = attached.angles


def test_reading_layers_are_those_with_full_attention_or_those_asked_for():
    attached = attach(build("gemma3_text"))._attached("test")  # its second layer sees everything
    assert reading_layers(attached, MemoryConfig.published()) == {1}
    assert reading_layers(attached, MemoryConfig.published(layers=[0, 2])) == {0, 2}
    with pytest.raises(ConfigError, match="0 to 2; got 3"):
        reading_layers(attached, MemoryConfig.published(layers=[1, 3]))
