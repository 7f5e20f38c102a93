"""`model.generate` in passage mode: every way of choosing tokens, chats over a cache, and refusals.

Expected is what an explicit `recalling` block with the same passages chooses.
"""

import copy
import threading

import torch
import pytest
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

from emt.errors import ConfigError
from tests.emt.routing.worlds import (
    BACKENDS,
    GREEDY,
    NEW,
    asked,
    build,
    chosen,
    document,
    left_padded,
    put,
    routing,
    tokens,
)
from tests.emt.words import word_tokenizer

PROMPTS = [asked(2, length=12), asked(0, length=5), asked(1, start=40)]
WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without a cache": {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "top_k": 20, "num_beams": 2},
    "static": {"cache_implementation": "static", "use_cache": True},
    "static beams": {"cache_implementation": "static", "use_cache": True, "num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 3, "use_cache": True},
}
HEADS = {"gemma3_text": ((1, 1), (1, 3))}


def recalled(memory, prompts):
    return [put(memory.route(prompt)) for prompt in prompts]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mpt"])
def test_what_is_chosen_is_what_a_block_gives(model_type, way):
    options, prompts = WAYS[way], PROMPTS[:1] if way == "drafts" else PROMPTS
    more = {"sliding_window": 16, "tie_word_embeddings": False}
    more = more if model_type == "gemma3_text" else {}
    model = build(model_type, **more)
    plain = chosen(model, prompts, **options)
    memory = routing(model, heads=HEADS.get(model_type, ((0, 1), (2, 3))))
    with memory.recording() as recording:
        found = chosen(model, prompts, **options)
    assert len(recording.routed) == len(prompts)
    with memory.recalling(recalled(memory, prompts), at=[0] * len(prompts)):
        assert chosen(model, prompts, **options) == found
    assert found != plain
    with memory.using(enabled=False):
        assert chosen(model, prompts, **options) == plain


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


def test_a_stream_from_another_thread():
    model, tokenizer = build("llama"), word_tokenizer()
    memory = routing(model)
    expected = chosen(model, PROMPTS[:1])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"inputs": PROMPTS[0][None], "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(expected[0]).split()
    assert memory.route(PROMPTS[0]).passages


def test_threads_do_not_mix_their_prompts():
    model = build("llama")
    routing(model)
    expected, found = [chosen(model, [prompt]) for prompt in PROMPTS], {}

    def run(row):
        for _ in range(3):
            found[row] = model.generate(PROMPTS[row][None], **GREEDY)[:, len(PROMPTS[row]) :]

    threads = [threading.Thread(target=run, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[row].tolist() for row in range(3)] == expected


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


@torch.no_grad()
def test_a_cache_of_fixed_size_is_used_again():
    model = build("llama")
    memory = routing(model)
    cache = StaticCache(config=model.config, max_cache_len=40)
    for prompt in PROMPTS:
        expected = chosen(model, [prompt])
        cache.reset()
        assert chosen(model, [prompt], past_key_values=cache) == expected
    with memory.using(enabled=False):
        expected = chosen(model, PROMPTS[:1])
        cache.reset()
        assert chosen(model, PROMPTS[:1], past_key_values=cache) == expected


def test_a_cache_given_to_generate_holds_the_prompt_only():
    model = build("llama")
    routing(model)
    cache = DynamicCache()
    model.generate(PROMPTS[0][None], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == len(PROMPTS[0]) + NEW - 1


def test_prompts_that_are_read_in_parts_are_refused():
    model = build("llama")
    memory = routing(model)
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        chosen(model, PROMPTS, prefill_chunk_size=4, use_cache=True)
    with memory.using(mode="token"):
        chosen(model, PROMPTS, prefill_chunk_size=4, use_cache=True)


def test_an_assistant_drafts_for_the_routed_prompt():
    model, assistant = build("llama"), build("llama", num_hidden_layers=1)
    routing(model)
    expected = chosen(model, PROMPTS[:1])
    assert chosen(model, PROMPTS[:1], assistant_model=assistant, use_cache=True) == expected


def test_uncertain_steps_are_not_redone():
    model = build("llama")
    memory = routing(model)
    expected = chosen(model, PROMPTS)
    with memory.using(uncertainty={"entropy": 0.0, "topk": 20}), memory.recording() as recording:
        assert chosen(model, PROMPTS) == expected
    assert recording.num_redone == 0


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("when", ["before attach", "in token mode", "in passage mode"])
def test_a_compiled_model_recalls_too(when):
    model = build("llama")
    compiled = torch.compile(model, backend="eager")
    prompt = PROMPTS[0][None]
    plain = model(prompt).logits
    if when == "before attach":
        assert torch.equal(compiled(prompt).logits, plain)
    memory = routing(model, mode="token")
    if when == "in token mode":
        compiled(prompt)
    with memory.using(mode="passage"):
        expected = model(prompt).logits
        assert (expected - plain).abs().max() > 1e-3
        assert torch.equal(compiled(prompt).logits, expected)
        assert chosen(compiled, PROMPTS) == chosen(model, PROMPTS)
    with memory.using(enabled=False):
        assert torch.equal(compiled(prompt).logits, plain)


@torch.no_grad()
def test_a_padded_batch_in_a_static_cache_is_routed_as_each_prompt_alone():
    model = build("llama")
    memory = routing(model)
    ids, mask = left_padded([torch.cat([document(0)[:30], PROMPTS[1]]), PROMPTS[0], PROMPTS[2]])
    with memory.recording() as recording:
        model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    for row, routed in enumerate(recording.routed):
        assert routed == memory.route(ids[row][mask[row] != 0])
