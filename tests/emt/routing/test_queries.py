"""Queries of prompts: what a model with a table of positions cannot read is refused."""

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import ConfigError
from emt.routing.queries import unit_queries
from tests.emt.routing.worlds import attached_model
from tests.emt.words import word_tokenizer
from tests.families import build


def test_a_prompt_longer_than_learned_positions_is_refused():
    model = build("gpt2", n_positions=32)
    attached = attached_model(attach(model))
    ids = torch.arange(5, 45)
    assert unit_queries(attached, ids[:32], [1], distance=16)[1].shape[1] == 32
    with pytest.raises(ConfigError, match="40 tokens must fit the model's 32 positions"):
        unit_queries(attached, ids, [1], distance=16)


def test_a_model_too_short_for_the_questions_of_a_profile_has_none(tmp_path):
    model = build("gpt2", n_positions=8)
    config = MemoryConfig(memory_type="vector_db", path=str(tmp_path / "store"))
    memory = attach(model, config, tokenizer=word_tokenizer())
    memory.write_all([("a", " ".join(f"w{number}" for number in range(5, 45)))])
    assert memory.profile is None
    assert memory.mode == "passage"
    assert len(memory) == 40


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bloom", "mpt"])
def test_texts_that_share_a_forward_have_the_queries_of_each_alone(family):
    attached = attached_model(attach(build(family)))
    layers = attached.full_attention_layers
    texts = [torch.arange(5, 5 + length) for length in (12, 3, 9)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    together = unit_queries(attached, padded, layers, distance=16)
    for place, ids in enumerate(texts):
        for layer, alone in unit_queries(attached, ids, layers, distance=16).items():
            torch.testing.assert_close(together[layer][place, :, : len(ids)], alone)
