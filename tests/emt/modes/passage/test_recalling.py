"""`generate` in a `recalling` block, against a prompt with the document in it; and refusals."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import pytest
from torch import Tensor

from emt import Memory, attach, detach
from emt.errors import ConfigError, DocumentError, MemoryUseError, UnsupportedModelError
from emt.passage import Passage
from tests.emt.modes.generation import GREEDY, WAYS, GenerateSuite, chosen
from tests.emt.modes.passage.recalled import BACKENDS, SCALED, left_padded, remembering, tokens
from tests.families import build

DOCUMENT = tokens(40, 1)
ALL = [Passage("d", 0, 40)]
PROMPTS = [tokens(length, length) for length in (9, 3, 6)]
FAMILIES = ["llama", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "mpt", "bloom", "falcon", "gptj"]


class TestRecalling(GenerateSuite):
    families: ClassVar = {model_type: {} for model_type in FAMILIES}
    prompts: ClassVar = PROMPTS
    # they count the tokens of the prompt, and so those of a document that is in it
    left_out: ClassVar = {"penalties", "repetition"}

    def attached(self, model: Any, memory_type: str = "manual") -> Memory:
        return remembering(model, DOCUMENT, memory_type)

    def reading(self, memory: Memory) -> contextlib.AbstractContextManager[Any]:
        return memory.recalling(ALL)

    def expected(
        self, model_type: str, prompts: Sequence[Tensor], **options: Any
    ) -> list[list[int]]:
        """Put the document into the prompts of the plain model."""
        whole = [torch.cat([DOCUMENT, prompt]) for prompt in prompts]
        return chosen(build(model_type), whole, **options)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_oss"])
def test_drafts_are_taken_back_from_small_windows(model_type):
    model = build(model_type, sliding_window=16)
    expected = chosen(model, [torch.cat([DOCUMENT, PROMPTS[0]])])
    memory = remembering(model, DOCUMENT)
    with memory.recalling(ALL):
        assert chosen(model, PROMPTS[:1], **WAYS["drafts"]) == expected


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("way", ["greedy", "beams", "static", "without a cache", "chunks"])
def test_each_prompt_of_a_batch_chooses_as_if_alone(way, memory_type):
    model = build("gemma3_text", sliding_window=16)
    memory = remembering(model, DOCUMENT, memory_type)
    memory.write(tokens(25, 9), document="other")
    passages = [[Passage("d", 6, 30)], [], [Passage("other", 0, 9), Passage("d", 30, 33)]]
    at, alone = [4, 0, 6], []
    for prompt, given, place in zip(PROMPTS, passages, at, strict=True):
        with memory.recalling(given, at=place):
            alone += chosen(model, [prompt], **WAYS[way])
    with memory.recalling(passages, at=at):
        assert chosen(model, PROMPTS, **WAYS[way]) == alone


@torch.no_grad()
def test_a_prompt_goes_on_from_a_cache_of_its_head():
    model = build("gemma2", sliding_window=16)
    memory = remembering(model, DOCUMENT)
    prompt = tokens(20, 4)
    with memory.recalling([Passage("d", 5, 30)], at=8):
        expected = model(prompt[None]).logits[0]
    with memory.using(enabled=False):
        head = model(prompt[None, :8], use_cache=True).past_key_values
    with memory.recalling([Passage("d", 5, 30)], at=8):
        for cache in (copy.deepcopy(head), head):
            first = model(prompt[None, 8:14], past_key_values=cache, use_cache=True)
            cache = copy.deepcopy(first.past_key_values)  # as if two answers began here
            last = model(prompt[None, 14:], past_key_values=cache, use_cache=True)
            found = torch.cat([first.logits[0], last.logits[0]])
            assert (found - expected[8:]).abs().max() <= 2e-5


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_passages_is_refused():
    model = build("llama")
    memory = remembering(model, DOCUMENT)
    prompt = tokens(12, 4)[None]
    with memory.using(enabled=False):
        plain = model(prompt, use_cache=True).past_key_values
    with memory.recalling([Passage("d", 5, 30)], at=12):
        mine = model(prompt, past_key_values=copy.deepcopy(plain), use_cache=True).past_key_values
    with (
        memory.recalling([Passage("d", 5, 30)], at=11),
        pytest.raises(MemoryUseError, match=r"before token 11 .* computed without them.*at=12"),
    ):
        model(prompt, past_key_values=plain, use_cache=True)
    with (
        memory.recalling([Passage("d", 5, 30)], at=24),
        pytest.raises(MemoryUseError, match="computed without them"),
    ):
        model(prompt, past_key_values=mine, use_cache=True)  # its keys make room for other rows
    with memory.recalling([Passage("d", 5, 30)]), pytest.raises(MemoryUseError):
        model.generate(torch.cat([prompt, prompt], 1), past_key_values=plain, **GREEDY)


@pytest.mark.parametrize(
    ("passages", "options", "error", "message"),
    [
        ([Passage("e", 0, 4)], {}, DocumentError, "no document.*'e'"),
        ([Passage("d", 3, 41)], {}, DocumentError, "first < stop <= 40.*stop=41"),
        ([Passage("d", -1, 4)], {}, DocumentError, "first=-1"),
        ([Passage("d", 4, 4)], {}, DocumentError, "first=4, stop=4"),
        ([Passage("d", 5, 9), Passage("d", 8, 12)], {}, ConfigError, "must not share rows"),
        ([Passage("d", 5, 9), Passage("d", 0, 2)], {"sinks": True}, ConfigError, "sinks=False"),
        (ALL, {"at": -1}, ConfigError, "at must be 0 or more.*-1"),
        ([ALL, ALL], {"at": [1, 2, 3]}, ConfigError, "2 of them; got 3"),
        ([ALL, *ALL], {}, ConfigError, "got both"),
        (["d"], {}, ConfigError, "expected Passage.*'d'"),
        (ALL, {"at": 4090}, ConfigError, "within the 4096 positions.*4130"),
    ],
)
def test_what_cannot_be_recalled(passages, options, error, message):
    memory = remembering(build("llama"), DOCUMENT)
    with pytest.raises(error, match=message), memory.recalling(passages, **options):
        pass
    with memory.recalling(ALL):  # nothing is left of it
        pass


def test_removed_rows_are_not_recalled():
    memory = remembering(build("llama"), DOCUMENT)
    memory.backend.remove([7])
    with (
        pytest.raises(DocumentError, match=r"1 rows .* were removed, the first of them row 7"),
        memory.recalling(ALL),
    ):
        pass
    with memory.recalling([Passage("d", 8, 12)]) as recall:
        assert recall.state.rows.ids.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11]]


@torch.no_grad()
def test_what_a_forward_refuses():
    model = build("llama", max_position_embeddings=64)
    memory = remembering(model, DOCUMENT)
    ids, mask = left_padded(PROMPTS)
    with memory.recalling([ALL, ALL]):
        with pytest.raises(MemoryUseError, match="2 prompts; got a batch of 3"):
            model(ids, attention_mask=mask)
        with pytest.raises(MemoryUseError, match="already"), memory.recalling(ALL):
            pass
    with memory.recalling(ALL):
        with pytest.raises(ConfigError, match=r"64 positions .* got 65"):
            model(tokens(25, 2)[None])
        model(tokens(24, 2)[None])
        ids, mask = left_padded([tokens(24, 2), tokens(30, 2)[:0]])
        with pytest.raises(ConfigError, match=r"count the tokens .* from 0"):
            model(ids[:1], position_ids=torch.arange(5, 29)[None])
        with pytest.raises(UnsupportedModelError, match="two dimensions"):
            model(ids[:1], attention_mask=torch.ones(1, 1, 24, 24, dtype=torch.bool))
        model.train()
        with pytest.raises(MemoryUseError, match="training mode"):
            model(ids[:1])


@torch.no_grad()
def test_frequencies_that_change_with_the_length_are_refused_from_there_on():
    model = build("llama", rope_parameters={"rope_theta": 1e4, **SCALED["longrope"]})
    memory = remembering(model, DOCUMENT)
    with memory.recalling(ALL):
        model(tokens(24, 2)[None])
        with pytest.raises(ConfigError, match="64 positions that the model rotates alike"):
            model(tokens(25, 2)[None])


def test_padding_does_not_count_as_positions():
    model = build("llama", max_position_embeddings=64)
    memory = remembering(model, DOCUMENT)
    ids, mask = left_padded(PROMPTS)
    wide = torch.nn.functional.pad(ids, (20, 0))
    with memory.recalling(ALL), torch.no_grad():
        found = model(wide, attention_mask=torch.nn.functional.pad(mask, (20, 0))).logits
        expected = model(ids, attention_mask=mask).logits
    assert (found[0, 20:] - expected[0]).abs().max() <= 2e-5


def test_a_detached_memory_recalls_nothing():
    model = build("llama")
    memory = attach(model)
    memory.write(DOCUMENT, document="d")
    detach(model)
    with pytest.raises(MemoryUseError, match="detached"), memory.recalling(ALL):
        pass


@torch.no_grad()
def test_a_cache_keeps_its_passages_in_a_block_without_any():
    model = build("llama")
    memory = remembering(model, DOCUMENT)
    prompt, more = tokens(12, 4)[None], tokens(5, 6)[None]
    with memory.recalling(ALL):
        cache = model(prompt, use_cache=True).past_key_values
        expected = model(more, past_key_values=copy.deepcopy(cache)).logits
    with memory.recalling([]):
        logits = model(more, past_key_values=cache).logits
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_a_cache_retrieves_no_memories_that_are_switched_off():
    model = build("llama")
    memory = remembering(model, DOCUMENT)
    prompt, more = tokens(12, 4)[None], tokens(5, 6)[None]
    with memory.recalling(ALL, retrieve=True):
        cache = model(prompt, use_cache=True).past_key_values
    caches = [copy.deepcopy(cache) for _ in range(3)]
    retrieving = model(more, past_key_values=caches[0]).logits
    with memory.using(enabled=False), memory.recording() as recording:
        disabled = model(more, past_key_values=caches[1]).logits
    assert {layer.ids.shape[-1] for step in recording for layer in step.values()} == {40}
    memory.close()
    assert torch.equal(model(more, past_key_values=caches[2]).logits, disabled)
    assert (disabled - retrieving).abs().max() > 1e-3
