"""`generate` in passage mode, against a block with the same passages; chats; refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import pytest
from torch import Tensor

from emt import Memory
from emt.errors import ConfigError
from tests.emt.modes.generation import GenerateSuite, chosen
from tests.emt.routing.worlds import (
    BACKENDS,
    GREEDY,
    HEADS,
    asked,
    build,
    document,
    left_padded,
    put,
    routing,
    tokens,
)

PROMPTS = [asked(2, length=12), asked(0, length=5), asked(1, start=40)]
FULL_ATTENTION_HEADS = {"gemma3_text": ((1, 1), (1, 3))}


class TestPassageMode(GenerateSuite):
    families: ClassVar = {
        "llama": {},
        "gemma3_text": {"sliding_window": 16, "tie_word_embeddings": False},
        "mpt": {},
    }
    prompts: ClassVar = PROMPTS
    left_out: ClassVar = {"chunks"}

    def attached(self, model: Any, memory_type: str = "manual") -> Memory:
        heads = FULL_ATTENTION_HEADS.get(model.config.model_type, HEADS)
        return routing(model, memory_type, heads=heads)

    def expected(
        self, model_type: str, prompts: Sequence[Tensor], **options: Any
    ) -> list[list[int]]:
        """Recall in a block, of token mode, what the prompts are routed to."""
        model = self.build(model_type)
        memory = self.attached(model)
        passages = [put(memory.route(prompt)) for prompt in prompts]
        assert all(passages)
        with memory.using(mode="token"), memory.recalling(passages, at=[0] * len(prompts)):
            return chosen(model, prompts, **options)


@pytest.mark.parametrize("memory_type", BACKENDS)
def test_the_prompts_of_a_batch_have_their_own_scopes(memory_type):
    model = build("llama")
    memory = routing(model, memory_type)
    lists, passages = [["two"], ["three"], ["one", "two"]], []
    for prompt, names in zip(PROMPTS, lists, strict=True):
        with memory.using(documents=names):
            passages.append(put(memory.route(prompt)))
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        with memory.using(documents=lists), memory.recording() as recording:
            found = chosen(model, PROMPTS, **options)
        assert [put(one) for one in recording.routed] == passages
        with memory.recalling(passages, at=[0, 0, 0]):
            assert chosen(model, PROMPTS, **options) == found


def test_equal_prompts_with_scopes_of_their_own():
    model = build("llama")
    memory = routing(model)
    with memory.using(documents=[["two"], ["three"]]), memory.recording() as recording:
        found = chosen(model, [PROMPTS[0]] * 2, num_beams=2)
    assert [one.passages[0].passage.document for one in recording.routed] == ["two", "three"]
    assert found[0] != found[1]


@torch.no_grad()
def test_a_cache_goes_on_with_its_passages_whatever_the_settings_are():
    model = build("llama")
    memory = routing(model)
    prompt, more = PROMPTS[0], tokens(5, 77)
    with memory.recalling(put(memory.route(prompt))):
        expected = model(torch.cat([prompt, more])[None]).logits[0, len(prompt) :]
    cache = model(prompt[None], use_cache=True).past_key_values
    for settings in ({}, {"enabled": False}, {"mode": "token"}, {"documents": []}):
        with memory.using(**settings):
            mine = copy.deepcopy(cache)
            steps = [model(token[None, None], past_key_values=mine).logits[0] for token in more]
        assert (torch.cat(steps) - expected).abs().max() <= 2e-5
    memory.clear()
    again = model(more[None], past_key_values=cache).logits[0]
    assert (again - expected).abs().max() <= 2e-5


def test_prompts_that_are_read_in_parts_are_refused():
    model = build("llama")
    memory = routing(model)
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        chosen(model, PROMPTS, prefill_chunk_size=4, use_cache=True)
    with memory.using(mode="token"):
        chosen(model, PROMPTS, prefill_chunk_size=4, use_cache=True)


def test_uncertain_steps_are_not_redone():
    model = build("llama")
    memory = routing(model)
    expected = chosen(model, PROMPTS)
    with memory.using(uncertainty={"entropy": 0.0, "topk": 20}), memory.recording() as recording:
        assert chosen(model, PROMPTS) == expected
    assert recording.num_redone == 0


@torch.no_grad()
def test_a_padded_batch_in_a_static_cache_is_routed_as_each_prompt_alone():
    model = build("llama")
    memory = routing(model)
    ids, mask = left_padded([torch.cat([document(0)[:30], PROMPTS[1]]), PROMPTS[0], PROMPTS[2]])
    with memory.recording() as recording:
        model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    for row, routed in enumerate(recording.routed):
        assert routed == memory.route(ids[row][mask[row] != 0])
