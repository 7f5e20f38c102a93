"""`model.generate` with a memory: every way of choosing tokens, against runs without any cache."""

import threading

import torch
import pytest
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer

from emt import MemoryConfig, attach, detach
from emt.errors import MemoryUseError
from tests.emt.words import word_tokenizer
from tests.families import VOCAB_SIZE, build

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
FAMILIES = ["llama", "gemma2", "gpt_oss", "gpt_neox", "gpt2"]


def remembering(model_type="llama", **settings):
    model = build(model_type)
    memory = attach(model, MemoryConfig(topk=4, **settings), tokenizer=word_tokenizer())
    memory.write(torch.randint(3, VOCAB_SIZE, (80,)), document="d")
    return model, memory


@torch.no_grad()
def greedy_by_hand(model, prompt):
    """Choose each token from a forward over everything before it, with no cache and no mask."""
    tokens = prompt
    for _ in range(NEW):
        logits = model(tokens, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=-1)
    return tokens


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_with_every_cache_is_greedy_without(model_type, cache, memory_type):
    model, memory = remembering(model_type, memory_type=memory_type)
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    found = model.generate(PROMPT, **GREEDY, **options)
    assert found.tolist() == greedy_by_hand(model, PROMPT).tolist()
    with memory.using(enabled=False):
        assert model.generate(PROMPT, **GREEDY, **options).tolist() != found.tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", FAMILIES[:1] + FAMILIES[3:])
def test_left_padded_batches_are_their_prompts_alone(model_type, implementation):
    model = build(model_type, attn_implementation=implementation)
    memory = attach(model, MemoryConfig(topk=4))
    memory.write(torch.randint(3, VOCAB_SIZE, (80,)), document="d")
    prompts = [PROMPT, PROMPT[:, :2], PROMPT[:, 2:]]
    input_ids = torch.cat(
        [torch.nn.functional.pad(prompt, (6 - prompt.shape[1], 0)) for prompt in prompts]
    )
    found = model.generate(input_ids, attention_mask=(input_ids > 0).long(), **GREEDY)
    for row, prompt in zip(found, prompts, strict=True):
        alone = greedy_by_hand(model, prompt)[0]
        assert row[6:].tolist() == alone[prompt.shape[1] :].tolist()


def test_beams_are_the_same_with_and_without_a_cache():
    model, memory = remembering()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 3}
    found = model.generate(PROMPT, **options)
    assert found.tolist() == model.generate(PROMPT, use_cache=False, **options).tolist()
    assert len({tuple(row) for row in found.tolist()}) == 3
    with memory.using(enabled=False):
        assert found.tolist() != model.generate(PROMPT, **options).tolist()


def test_sampling_is_the_same_with_and_without_a_cache():
    model, memory = remembering()
    options = {**GREEDY, "do_sample": True, "temperature": 1.5, "num_return_sequences": 4}
    drawn = []
    for enabled, use_cache in ((True, True), (True, False), (False, True)):
        torch.manual_seed(3)
        with memory.using(enabled=enabled):
            drawn.append(model.generate(PROMPT, use_cache=use_cache, **options).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


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
        caught = []

        def keep():
            try:
                action()
            except MemoryUseError as error:
                caught.append(error)

        thread = threading.Thread(target=keep)
        thread.start()
        thread.join()
        if caught:
            raise caught[0]

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


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise ZeroDivisionError


def test_an_error_inside_generate_leaves_the_memory_usable():
    model, memory = remembering()
    expected = model.generate(PROMPT, **GREEDY).tolist()
    with pytest.raises(ZeroDivisionError), memory.using(topk=1):
        model.generate(PROMPT, stopping_criteria=[Stop()], **GREEDY)
    assert memory.config.topk == 4
    assert model.generate(PROMPT, **GREEDY).tolist() == expected
    assert memory.write([5, 6, 7], document="other") == range(80, 83)


def test_many_threads_may_generate():
    model, _ = remembering()
    prompts = [PROMPT, PROMPT.flip(1), PROMPT[:, :3]]
    expected = [model.generate(prompt, **GREEDY).tolist() for prompt in prompts]
    found = [None] * 3

    def generate(at):
        found[at] = model.generate(prompts[at], **GREEDY).tolist()

    threads = [threading.Thread(target=generate, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_chunks_of_queries_change_nothing(model_type, monkeypatch):
    model, _ = remembering(model_type)
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 50))
    mask = torch.ones_like(input_ids)
    mask[1, :20] = 0
    whole = model(input_ids, attention_mask=mask).logits
    monkeypatch.setattr("emt.model.call._CHUNK_BYTES", 30_000)
    chunked = model(input_ids, attention_mask=mask).logits
    assert whole.isfinite().all()
    torch.testing.assert_close(chunked[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=0)
