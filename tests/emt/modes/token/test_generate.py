"""`generate` in token mode, against forwards without any cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
import pytest
from torch import Tensor
from transformers import LogitsProcessor, TextIteratorStreamer

from emt import Memory, MemoryConfig, attach, detach
from emt.errors import MemoryUseError
from tests.emt.modes.generation import (
    GREEDY,
    NEW,
    GenerateSuite,
    chosen,
)
from tests.emt.modes.passage.recalled import BACKENDS
from tests.emt.words import word_tokenizer
from tests.families import VOCAB_SIZE, build

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
FAMILIES = ["llama", "gemma2", "gpt_oss", "gpt_neox", "gpt2"]


def remembering(model: Any = "llama", memory_type: str = "manual", **settings: Any) -> Any:
    """Return a model and its memory of 80 tokens."""
    model = build(model) if isinstance(model, str) else model
    config = MemoryConfig.published(
        **{"topk": 4, "memory_type": memory_type, **BACKENDS[memory_type], **settings}
    )
    memory = attach(model, config, tokenizer=word_tokenizer())
    generator = torch.Generator().manual_seed(7)
    memory.write(torch.randint(3, VOCAB_SIZE, (80,), generator=generator), document="d")
    return model, memory


@torch.no_grad()
def greedy_by_hand(model: Any, prompt: Tensor) -> list[int]:
    """Choose each token from a forward over everything before it, with no cache and no mask."""
    tokens = prompt[None]
    for _ in range(NEW):
        logits = model(tokens, use_cache=False).logits[:, -1]
        logits[:, [0, 2]] = -torch.inf  # suppress_tokens, min_new_tokens
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=-1)
    return tokens[0, len(prompt) :].tolist()


class TestTokenMode(GenerateSuite):
    families: ClassVar = {model_type: {} for model_type in FAMILIES}
    prompts: ClassVar = [PROMPT[0], PROMPT[0, :2], PROMPT[0, 2:]]

    def attached(self, model: Any, memory_type: str = "manual") -> Memory:
        return remembering(model, memory_type)[1]

    def expected(
        self, model_type: str, prompts: Sequence[Tensor], **options: Any
    ) -> list[list[int]]:
        """Run forwards by hand; samples, beams and penalties are drawn without a cache."""
        model, _ = remembering(model_type)
        for name in ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens"):
            options.pop(name, None)
        if not options.keys() - {"use_cache"}:
            return [greedy_by_hand(model, prompt) for prompt in prompts]
        options["use_cache"] = False
        if options.get("do_sample"):
            return chosen(model, prompts, **options)
        return [row for prompt in prompts for row in chosen(model, [prompt], **options)]

    def test_an_assistant_drafts_several_tokens_at_once(self) -> None:
        model, memory = remembering()
        with memory.recording(whole_prompt=True) as steps:
            chosen(model, self.prompts[:1], assistant_model=model, use_cache=True)
        lengths = [next(iter(step.values())).ids.shape[2] for step in steps]
        assert any(length > 1 for length in lengths[1:])


def test_streaming_through_a_thread_sees_the_options_of_this_one():
    model, memory = remembering()
    tokenizer = memory.tokenizer
    expected = {
        topk: tokenizer.decode(run(model, memory, topk)[0], skip_special_tokens=True)
        for topk in (1, 4)
    }
    assert expected[1] != expected[4]
    for topk, text in expected.items():
        streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
        with memory.using(topk=topk), memory.recording() as recorded:
            thread = threading.Thread(
                target=model.generate, args=(PROMPT,), kwargs={**GREEDY, "streamer": streamer}
            )
            thread.start()
            streamed = "".join(streamer)
            thread.join()
        assert streamed == text
        assert [step[0].ids.shape[-1] for step in recorded] == [topk] * NEW


def run(model, memory, topk):
    with memory.using(topk=topk):
        return model.generate(PROMPT, **GREEDY)


class Meanwhile(LogitsProcessor):
    """Does something at every step, and keeps the errors."""

    def __init__(self, *actions):
        self.actions = actions
        self.errors = []

    def __call__(self, input_ids, scores):
        for action in self.actions:
            try:
                action()
            except MemoryUseError as error:
                self.errors.append(str(error))
        return scores


def in_a_thread(action):
    def run():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(action).result()

    return run


@pytest.mark.parametrize("where", [lambda action: action, in_a_thread], ids=["here", "thread"])
def test_nothing_changes_the_memory_while_generating(where, tmp_path):
    model, memory = remembering()
    expected = model.generate(PROMPT, **GREEDY).tolist()
    actions = {
        "write": lambda: memory.write([5, 6, 7], document="other"),
        "remove": lambda: memory.remove("d"),
        "clear": memory.clear,
        "save": lambda: memory.save(tmp_path / "copy"),
        "open": lambda: memory.open(tmp_path.parent),
        "close": memory.close,
        "detach": lambda: detach(model),
    }
    meanwhile = Meanwhile(*(where(action) for action in actions.values()))
    found = model.generate(PROMPT, logits_processor=[meanwhile], **GREEDY)
    assert found.tolist() == expected
    assert meanwhile.errors == NEW * [
        f"cannot {name} while the model is generating. Wait for it to return." for name in actions
    ]
    assert (memory.documents, len(memory)) == (["d"], 80)
    assert not (tmp_path / "copy").exists()


def test_generating_while_writing_is_refused():
    model, memory = remembering(stride=10, max_length=10)
    errors = []

    def generate_meanwhile(num_rows):
        with pytest.raises(MemoryUseError) as caught:
            model.generate(PROMPT, **GREEDY)
        errors.append((num_rows, str(caught.value)))

    text = " ".join(f"w{number}" for number in range(3, 28))
    assert memory.write_all([("e", text)], on_rows=generate_meanwhile) == (1, 0, 0)
    message = "cannot generate while the memory is busy with write(). Wait for it to return."
    assert errors == [(9, message), (10, message), (6, message)]
    assert memory.documents == ["d", "e"]
    assert model.generate(PROMPT, **GREEDY).shape == (1, 6 + NEW)


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_chunks_of_queries_change_nothing(model_type, monkeypatch):
    model, _ = remembering(model_type)
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 50))
    mask = torch.ones_like(input_ids)
    mask[1, :20] = 0
    whole = model(input_ids, attention_mask=mask).logits
    monkeypatch.setattr("emt.model.attention_call._CHUNK_BYTES", 30_000)
    chunked = model(input_ids, attention_mask=mask).logits
    assert whole.isfinite().all()
    torch.testing.assert_close(chunked[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=0)
