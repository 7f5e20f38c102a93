"""transformers' other ways to generate, with a memory: pipelines, drafts, chunks, compiled models.

Expected is the greedy choice from runs without any cache, or the same call with one prompt alone.
"""

import copy

import torch
import pytest
from transformers import pipeline

from emt import MemoryConfig, attach, detach
from emt.errors import MemoryUseError
from tests.emt.modes.token.test_generate import (
    FAMILIES,
    GREEDY,
    PROMPT,
    greedy_by_hand,
    remembering,
)
from tests.families import VOCAB_SIZE, build

BACKENDS = {"manual": {}, "vector_db": {"index": "Flat"}}


def in_every_backend(generate):
    """Return what a function of a model and its memory gives with each backend."""
    found = []
    for memory_type, settings in BACKENDS.items():
        torch.manual_seed(0)
        model, memory = remembering(memory_type=memory_type, **settings)
        found.append(generate(model, memory))
        with memory.using(enabled=False):
            assert generate(model, memory) != found[-1]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "length_penalty": 0.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3},
        {"do_sample": True, "top_p": 0.8, "top_k": 20, "num_beams": 2},
        {"repetition_penalty": 1.4},
    ],
    ids=["beams", "penalties", "sampled", "sampled beams", "repetition"],
)
def test_both_backends_choose_the_same_tokens(options):
    def generate(model, memory):
        torch.manual_seed(5)
        # Token 0 has an embedding of zeros, whose query is as near to any row as to any other.
        return model.generate(PROMPT, suppress_tokens=[0], **{**GREEDY, **options}).tolist()

    manual, vector_db = in_every_backend(generate)
    assert manual == vector_db
    assert len(manual) == options.get("num_return_sequences", 1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_beams_of_a_left_padded_batch_are_those_of_its_prompts(model_type):
    model, _ = remembering(model_type)
    prompts = [PROMPT, PROMPT[:, :2], PROMPT[:, 2:]]
    input_ids = torch.cat(
        [torch.nn.functional.pad(prompt, (6 - prompt.shape[1], 0)) for prompt in prompts]
    )
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate(input_ids, attention_mask=(input_ids > 0).long(), **options)
    alone = [
        row[prompt.shape[1] :].tolist()
        for prompt in prompts
        for row in model.generate(prompt, **options)
    ]
    assert found[:, 6:].tolist() == alone


@pytest.mark.parametrize("memory_type", BACKENDS)
def test_a_pipeline_writes_what_the_model_chooses(memory_type):
    model, memory = remembering(memory_type=memory_type, **BACKENDS[memory_type])
    tokenizer = memory.tokenizer
    tokenizer.padding_side = "left"
    texts = ["w5 w9 w33 w60", "w7", "w80 w12 w44"]
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected.append(tokenizer.decode(greedy_by_hand(model, ids)[0, ids.shape[1] :]))
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    alone = [writer(text, return_full_text=False, **GREEDY) for text in texts]
    batch = writer(texts, batch_size=3, return_full_text=False, **GREEDY)
    assert [one["generated_text"] for [one] in alone] == expected
    assert [one["generated_text"] for [one] in batch] == expected
    with memory.using(enabled=False):
        assert writer(texts[0], return_full_text=False, **GREEDY) != alone[0]


def another(model):
    return build(model.config.model_type, num_hidden_layers=3, initializer_range=0.16)


def the_same_without_memory(model):
    return copy.deepcopy(model)


def itself(model):
    return model


@pytest.mark.parametrize("draft", [another, the_same_without_memory, itself])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_drafts_of_an_assistant_change_nothing(model_type, draft):
    model, memory = remembering(model_type)
    expected = greedy_by_hand(model, PROMPT).tolist()
    with memory.recording(whole_prompt=True) as steps:
        found = model.generate(PROMPT, assistant_model=draft(model), **GREEDY)
    assert found.tolist() == expected
    lengths = [next(iter(step.values())).ids.shape[2] for step in steps]
    assert any(length > 1 for length in lengths[1:])  # drafts were checked, several at once


@pytest.mark.parametrize("model_type", FAMILIES)
def test_drafts_from_the_prompt_change_nothing(model_type):
    model, _ = remembering(model_type)
    prompt = greedy_by_hand(model, PROMPT).repeat(1, 2)
    expected = greedy_by_hand(model, prompt).tolist()
    found = model.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY)
    assert found.tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_prompt_in_chunks_is_the_prompt(model_type, size):
    model, _ = remembering(model_type)
    expected = greedy_by_hand(model, PROMPT).tolist()
    assert model.generate(PROMPT, prefill_chunk_size=size, **GREEDY).tolist() == expected


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("order", "memory_type"),
    [
        ("attached first", "manual"),
        ("compiled first", "vector_db"),
        pytest.param("attached first", "vector_db", marks=pytest.mark.slow),
        pytest.param("compiled first", "manual", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_remembers(order, memory_type):
    model = build("llama")
    config = MemoryConfig(topk=4, memory_type=memory_type, **BACKENDS[memory_type])
    if order == "attached first":
        memory = attach(model, config)
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        memory = attach(compiled, config)
        with pytest.raises(MemoryUseError, match="already has a memory"):
            attach(model)
    assert torch.equal(compiled(PROMPT).logits, model(PROMPT).logits)
    memory.write(torch.randint(3, VOCAB_SIZE, (80,)), document="d")
    stock = build("llama")(PROMPT).logits
    for topk in (4, 2):  # what was compiled does not remember the options
        with memory.using(topk=topk):
            found = compiled(PROMPT).logits
            torch.testing.assert_close(found, model(PROMPT).logits, atol=2e-5, rtol=0)
            assert (found - stock).abs().max() > 0.1
    expected = greedy_by_hand(model, PROMPT).tolist()
    assert compiled.generate(PROMPT, **GREEDY).tolist() == expected
    with memory.using(enabled=False):
        torch.testing.assert_close(compiled(PROMPT).logits, stock, atol=2e-5, rtol=0)
    detach(compiled)
    torch.testing.assert_close(compiled(PROMPT).logits, stock, atol=2e-5, rtol=0)
