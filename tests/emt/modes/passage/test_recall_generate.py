"""`model.generate` with recalled passages: every way of choosing tokens, and what it refuses.

Expected is what the plain model chooses with the document in its prompt.
"""

import copy
import threading

import torch
import pytest
from transformers import DynamicCache, TextIteratorStreamer

from emt import attach, detach
from emt.errors import ConfigError, DocumentError, MemoryUseError, UnsupportedModelError
from emt.passage import Passage
from tests.emt.modes.passage.test_recall import BACKENDS, SCALED, left_padded, remembering, tokens
from tests.emt.words import word_tokenizer
from tests.families import build

DOCUMENT = tokens(40, 1)
ALL = [Passage("d", 0, 40)]
PROMPTS = [tokens(length, length) for length in (9, 3, 6)]
NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
FAMILIES = ["llama", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "mpt", "bloom", "falcon", "gptj"]
WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without a cache": {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "top_k": 20, "num_beams": 2},
    "chunks": {"prefill_chunk_size": 4, "use_cache": True},
    "static": {"cache_implementation": "static", "use_cache": True},
    "static beams": {"cache_implementation": "static", "use_cache": True, "num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 3, "use_cache": True},
}


def chosen(model, prompts, document=None, **options):
    """Generate from a left-padded batch of prompts; return the new tokens."""
    if document is not None:
        prompts = [torch.cat([document, prompt]) for prompt in prompts]
    ids, mask = left_padded(prompts)
    torch.manual_seed(3)
    found = model.generate(ids, attention_mask=mask, **{**GREEDY, **options})
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_chosen_is_what_the_document_in_the_prompt_would_give(model_type, way):
    options, prompts = WAYS[way], PROMPTS[:1] if way == "drafts" else PROMPTS
    model = build(model_type)
    expected = chosen(model, prompts, DOCUMENT, **options)
    plain = chosen(model, prompts, **options)
    memory = remembering(model, DOCUMENT)
    with memory.recalling(ALL):
        assert chosen(model, prompts, **options) == expected
    with memory.using(enabled=False):
        assert chosen(model, prompts, **options) == plain != expected


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_oss"])
def test_drafts_are_taken_back_from_small_windows(model_type):
    model = build(model_type, sliding_window=16)
    expected = chosen(model, PROMPTS[:1], DOCUMENT)
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


def test_a_stream_from_another_thread():
    model, tokenizer = build("llama"), word_tokenizer()
    expected = chosen(model, PROMPTS[:1], DOCUMENT)
    memory = remembering(model, DOCUMENT)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"inputs": PROMPTS[0][None], "streamer": streamer, **GREEDY}
    with memory.recalling(ALL):
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.split() == tokenizer.decode(expected[0]).split()


def test_threads_do_not_mix_their_prompts():
    model = build("llama")
    expected = [chosen(model, [prompt], DOCUMENT) for prompt in PROMPTS]
    memory, found = remembering(model, DOCUMENT), {}

    def run(row):
        for _ in range(3):
            found[row] = model.generate(PROMPTS[row][None], **GREEDY)[:, len(PROMPTS[row]) :]

    with memory.recalling(ALL):
        threads = [threading.Thread(target=run, args=(row,)) for row in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[row].tolist() for row in range(3)] == expected


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.usefixtures("_fresh_compiler")
def test_what_was_compiled_before_recalls_too():
    model = build("llama")
    expected = chosen(model, PROMPTS, DOCUMENT)
    memory = remembering(model, DOCUMENT)
    compiled = torch.compile(model, backend="eager")
    with memory.using(enabled=False):
        plain = compiled(PROMPTS[0][None]).logits
    with memory.recalling(ALL):
        logits = model(PROMPTS[0][None]).logits
        assert torch.equal(compiled(PROMPTS[0][None]).logits, logits)
        assert chosen(compiled, PROMPTS) == expected
    with memory.using(enabled=False):
        assert torch.equal(compiled(PROMPTS[0][None]).logits, plain)
    assert (plain - logits).abs().max() > 0.1


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


@torch.no_grad()
def test_the_model_is_the_plain_one_after_an_error():
    model = build("llama")
    prompt = tokens(12, 4)[None]
    plain = model(prompt).logits
    memory = remembering(model, DOCUMENT)
    hooks = len(model.model._forward_pre_hooks), len(model.model._forward_hooks)
    with pytest.raises(IndexError), memory.recalling(ALL):
        model(torch.tensor([[1000]]))  # fails after the rows were put in
    assert hooks == (len(model.model._forward_pre_hooks), len(model.model._forward_hooks))
    with memory.using(enabled=False):
        assert torch.equal(model(prompt).logits, plain)
    with memory.recalling(ALL):
        detach(model)
        assert torch.equal(model(prompt).logits, plain)
    assert torch.equal(model(prompt).logits, plain)


@torch.no_grad()
def test_a_copy_of_the_model_recalls_nothing():
    model = build("llama")
    prompt = tokens(12, 4)[None]
    plain = model(prompt).logits
    memory = remembering(model, DOCUMENT)
    with memory.recalling(ALL):
        assert torch.equal(copy.deepcopy(model)(prompt).logits, plain)


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


def test_a_cache_given_to_generate_holds_the_prompt_only():
    model = build("llama")
    memory = remembering(model, DOCUMENT)
    cache = DynamicCache()
    with memory.recalling(ALL):
        model.generate(PROMPTS[0][None], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == len(PROMPTS[0]) + NEW - 1
