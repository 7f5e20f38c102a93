"""One suite of `generate()` for every mode: beams, samples, batches, caches, streams, threads.

A mode's test file inherits `GenerateSuite` and says how a model gets its memory, and what should
come out of it, computed in another way.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import pytest
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)

from emt import Memory, attach, detach
from emt.errors import MemoryUseError
from tests.emt.modes.passage.recalled import left_padded
from tests.emt.words import word_tokenizer
from tests.families import build

NEW = 8
# Token 0 has an embedding of zeros, whose query is as near to any row as to any other.
GREEDY = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "suppress_tokens": [0],
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without a cache": {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
    "penalties": {"num_beams": 3, "length_penalty": 0.3, "no_repeat_ngram_size": 2},
    "repetition": {"repetition_penalty": 1.4},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "top_p": 0.8, "top_k": 20, "num_beams": 2},
    "chunks": {"prefill_chunk_size": 4, "use_cache": True},
    "static": {"cache_implementation": "static", "use_cache": True},
    "static beams": {"cache_implementation": "static", "use_cache": True, "num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 3, "use_cache": True},
}
COMMON = {"greedy", "beams", "repetition", "sampled", "static", "drafts"}
ONE_PROMPT = {"drafts"}  # transformers drafts for a single sequence


def chosen(model: PreTrainedModel, prompts: Sequence[Tensor], **options: Any) -> list[list[int]]:
    """Generate from a left-padded batch of prompts, from one seed; return the new tokens."""
    ids, mask = left_padded(prompts)
    torch.manual_seed(3)
    output = model.generate(ids, attention_mask=mask, **{**GREEDY, **options})
    return output[:, ids.shape[1] :].tolist()


def run_together(*calls: Any) -> None:
    """Run calls in threads of their own."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def another(model: PreTrainedModel) -> PreTrainedModel:
    return build(model.config.model_type, num_hidden_layers=3, initializer_range=0.16)


def without_memory(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


def itself(model: PreTrainedModel) -> PreTrainedModel:
    return model


class Stop(StoppingCriteria):
    """An error in the middle of `generate`."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        raise ZeroDivisionError


class GenerateSuite:
    """The tests; a subclass sets `families` and `prompts` and overrides the next three methods."""

    families: ClassVar[dict[str, dict[str, Any]]]
    prompts: ClassVar[list[Tensor]]
    left_out: ClassVar[set[str]] = set()  # ways that the mode or the comparison cannot do

    def attached(self, model: PreTrainedModel, memory_type: str = "manual") -> Memory:
        """Attach a memory with something in it."""
        raise NotImplementedError

    def reading(self, memory: Memory) -> contextlib.AbstractContextManager[Any]:
        """Return the block in which the memory is read; for most modes, no block is needed."""
        return contextlib.nullcontext(memory)

    def expected(
        self, model_type: str, prompts: Sequence[Tensor], **options: Any
    ) -> list[list[int]]:
        """Compute the new tokens of `chosen` in another way."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every way with three families, and the common ones with all; the rest is slow."""
        ways = [way for way in WAYS if way not in self.left_out]
        if metafunc.function.__name__ == "test_every_way_chooses_the_expected_tokens":
            common = list(self.families)[:3]
            pairs = [
                pytest.param(
                    family, way, marks=[] if family in common or way in COMMON else pytest.mark.slow
                )
                for family in self.families
                for way in ways
            ]
            metafunc.parametrize(("model_type", "way"), pairs)
        elif "way" in metafunc.fixturenames:
            metafunc.parametrize("way", [way for way in ways if way in COMMON])

    # -- ways to choose tokens --------------------------------------------------------------------

    def build(self, model_type: str) -> PreTrainedModel:
        return build(model_type, **self.families[model_type])

    @pytest.fixture
    def model_type(self) -> str:
        return next(iter(self.families))

    def check_way(self, model_type: str, way: str, memory_type: str = "manual") -> None:
        options = WAYS[way]
        prompts = self.prompts[:1] if way in ONE_PROMPT else self.prompts
        expected = self.expected(model_type, prompts, **options)
        model = self.build(model_type)
        plain = chosen(model, prompts, **options)
        memory = self.attached(model, memory_type)
        with self.reading(memory):
            assert chosen(model, prompts, **options) == expected
            with memory.using(enabled=False):
                assert chosen(model, prompts, **options) == plain != expected

    def test_every_way_chooses_the_expected_tokens(self, model_type: str, way: str) -> None:
        self.check_way(model_type, way)

    def test_the_other_backend_chooses_the_same(self, model_type: str, way: str) -> None:
        self.check_way(model_type, way, "vector_db")

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_padding_changes_nothing(self, model_type: str, implementation: str) -> None:
        model = build(model_type, attn_implementation=implementation, **self.families[model_type])
        with self.reading(self.attached(model)):
            together = chosen(model, self.prompts)
            alone = [row for prompt in self.prompts for row in chosen(model, [prompt])]
        assert together == alone

    @pytest.mark.parametrize("draft", [another, without_memory, itself])
    def test_drafts_of_an_assistant_change_nothing(self, model_type: str, draft: Any) -> None:
        expected = self.expected(model_type, self.prompts[:1])
        model = self.build(model_type)
        with self.reading(self.attached(model)):
            options = {"assistant_model": draft(model), "use_cache": True}
            assert chosen(model, self.prompts[:1], **options) == expected

    # -- caches -----------------------------------------------------------------------------------

    def test_a_cache_given_to_generate_holds_the_prompt_only(self, model_type: str) -> None:
        model, cache = self.build(model_type), DynamicCache()
        with self.reading(self.attached(model)):
            model.generate(self.prompts[0][None], past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == len(self.prompts[0]) + NEW - 1

    def test_a_cache_of_fixed_size_is_used_again(self, model_type: str) -> None:
        model = self.build(model_type)
        cache = StaticCache(config=model.config, max_cache_len=120)
        memory = self.attached(model)
        for enabled in (True, False):
            with self.reading(memory), memory.using(enabled=enabled):
                for prompt in self.prompts:
                    cache.reset()
                    tokens = chosen(model, [prompt], past_key_values=cache)
                    assert tokens == chosen(model, [prompt])

    # -- threads, streams, pipelines --------------------------------------------------------------

    def test_a_stream_from_another_thread(self, model_type: str) -> None:
        expected = self.expected(model_type, self.prompts[:1])
        model, tokenizer = self.build(model_type), word_tokenizer()
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {"inputs": self.prompts[0][None], "streamer": streamer, **GREEDY}
        with self.reading(self.attached(model)):
            thread = threading.Thread(target=model.generate, kwargs=options)
            thread.start()
            text = "".join(streamer)
            thread.join()
        assert text.split() == tokenizer.decode(expected[0]).split()

    def test_threads_do_not_mix_their_prompts(self, model_type: str) -> None:
        expected = self.expected(model_type, self.prompts)
        model, answers = self.build(model_type), {}

        def run(row: int) -> None:
            for _ in range(3):
                prompt = self.prompts[row]
                answers[row] = model.generate(prompt[None], **GREEDY)[0, len(prompt) :].tolist()

        with self.reading(self.attached(model)):
            run_together(*(lambda row=row: run(row) for row in range(len(self.prompts))))
        assert [answers[row] for row in range(len(self.prompts))] == expected

    def test_a_pipeline_writes_what_the_model_chooses(self, model_type: str) -> None:
        tokenizer = word_tokenizer()
        tokenizer.padding_side = "left"
        bos = torch.tensor([1])
        prompts = [torch.cat([bos, prompt]) for prompt in self.prompts]
        expected = [
            tokenizer.decode(row, skip_special_tokens=True)
            for row in self.expected(model_type, prompts)
        ]
        model = self.build(model_type)
        texts = [tokenizer.decode(prompt) for prompt in self.prompts]
        options = {"return_full_text": False, **GREEDY}
        with self.reading(self.attached(model)):
            writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
            alone = [writer(text, **options) for text in texts]
            batch = writer(texts, batch_size=3, **options)
        assert [answer["generated_text"] for [answer] in alone] == expected
        assert [answer["generated_text"] for [answer] in batch] == expected

    # -- the model --------------------------------------------------------------------------------

    @pytest.fixture
    def _fresh_compiler(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @torch.no_grad()
    @pytest.mark.usefixtures("_fresh_compiler")
    @pytest.mark.parametrize("first", ["attached", "compiled", "called"])
    def test_a_compiled_model_remembers(self, model_type: str, first: str) -> None:
        model, prompt = self.build(model_type), self.prompts[0][None]
        plain = model(prompt).logits
        if first == "attached":
            memory = self.attached(model)
            compiled = torch.compile(model, backend="eager")
        else:
            compiled = torch.compile(model, backend="eager")
            if first == "called":
                assert torch.equal(compiled(prompt).logits, plain)
            memory = self.attached(compiled)
            with pytest.raises(MemoryUseError):
                attach(model)
        with self.reading(memory):
            logits = model(prompt).logits
            assert (logits - plain).abs().max() > 1e-3
            torch.testing.assert_close(compiled(prompt).logits, logits, atol=2e-5, rtol=0)
            if first == "called":  # the others trace the same code for as long
                assert chosen(compiled, self.prompts) == self.expected(model_type, self.prompts)
            with memory.using(enabled=False):
                torch.testing.assert_close(compiled(prompt).logits, plain, atol=2e-5, rtol=0)
        detach(compiled)
        torch.testing.assert_close(compiled(prompt).logits, plain, atol=2e-5, rtol=0)

    @torch.no_grad()
    def test_the_model_is_as_it_was_after_an_error(self, model_type: str) -> None:
        expected = self.expected(model_type, self.prompts)
        model = self.build(model_type)
        plain = model(self.prompts[0][None]).logits
        memory = self.attached(model)
        for options in ({"stopping_criteria": [Stop()]}, {"inputs": torch.tensor([[1000]])}):
            options = {"inputs": self.prompts[0][None], **GREEDY, **options}
            with pytest.raises((ZeroDivisionError, IndexError)), self.reading(memory):
                model.generate(**options)
        with self.reading(memory):
            assert chosen(model, self.prompts) == expected
            assert torch.equal(copy.deepcopy(model)(self.prompts[0][None]).logits, plain)
        assert len(memory.write([5, 6, 7], document="new")) == 3
        with self.reading(memory):
            detach(model)
            assert torch.equal(model(self.prompts[0][None]).logits, plain)
        assert not model._forward_hooks
