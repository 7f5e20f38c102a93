"""Memories at their true positions, all retrieved, are context: see `families.oracle_error`."""

import pytest

from emt import MemoryConfig, attach
from tests.families import FAMILIES, REFUSED, build, oracle_error

TOLERANCE = 2e-5
BACKENDS = {"manual": {}, "vector_db": {"index": "Flat"}}
BATCHES = {"one": (12,), "left-padded": (12, 5, 9)}


def config(memory_type, **settings):
    return MemoryConfig.published(memory_type=memory_type, **BACKENDS[memory_type], **settings)


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_memories_are_context(family, lengths, memory_type):
    model = family.build()
    memory = attach(model, config(memory_type))
    assert oracle_error(model, memory, lengths=lengths) <= TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
def test_eager_and_sdpa_masks_both_work(model_type, implementation):
    model = build(model_type, attn_implementation=implementation)
    memory = attach(model)
    assert oracle_error(model, memory, lengths=(12, 5, 9)) <= TOLERANCE


@pytest.mark.parametrize("memory_type", BACKENDS)
def test_the_oracle_can_fail(memory_type):
    model = build("llama")
    memory = attach(model, config(memory_type))
    assert oracle_error(model, memory, topk=1) > 1e-3


def test_the_families_asked_for_are_there():
    names = {family.model_type for family in FAMILIES}
    assert names >= {
        *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss"),
        *("olmo2", "gpt_neox", "cohere"),
    }
    assert not names & {family.model_type for family in REFUSED}
