"""Calls of extended models that come at once, in parts, or in ways that leave something out."""

import io
import threading

import torch
import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import emt
from emt import MemoryConfig
from emt.errors import ConfigError
from tests.emt.published.extended import LLAMA, MEMORY, PROMPT, llama, logits
from tests.families import build

INDICES = {"output_retrieved_memory_idx": True, "return_dict_in_generate": True}


def generate(model, num_tokens=6, **options):
    return model.generate(
        PROMPT, max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, **options
    )


def at_once(calls):
    """Run calls in threads of their own that begin together; return what they return."""
    found, begin = [None] * len(calls), threading.Barrier(len(calls))

    def run(at):
        begin.wait()
        found[at] = calls[at]()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# -- threads ----------------------------------------------------------------------------------


def test_options_of_one_call_are_no_other_threads(model):
    options = [{"topk": 1}, {"topk": 10}, {"use_external_mind": False}]
    expected = [generate(model, 20, **each) for each in options]
    assert len({tuple(each[0].tolist()) for each in expected}) == 3
    calls = [lambda each=each: generate(model, 20, **each) for each in options * 4]
    for found, wanted in zip(at_once(calls), expected * 4, strict=True):
        assert torch.equal(found, wanted)


def test_indices_of_one_call_are_no_other_threads(model):
    expected = generate(model, 12, **INDICES)
    for found in at_once([lambda: generate(model, 12, **INDICES)] * 4):
        assert len(found.attentions) == len(found.recording) == 12
        for step, wanted in zip(found.attentions, expected.attentions, strict=True):
            assert all(torch.equal(*pair) for pair in zip(step[1], wanted[1], strict=True))


def test_first_calls_at_once_all_remember(model):
    expected = logits(llama())
    for found in at_once([lambda: logits(model)] * 4):
        assert torch.equal(found, expected)


# -- weights and indices side by side ---------------------------------------------------------


def test_weights_and_indices_of_a_prompt_in_chunks_belong_together(model):
    whole = generate(model, output_attentions=True, **INDICES)
    parts = generate(model, output_attentions=True, prefill_chunk_size=2, **INDICES)
    assert [weights is None for weights, _ in parts.attentions] == [True] * 2 + [False] * 6
    prompt = [indices for _, indices in parts.attentions[:3]]
    for layer_idx, expected in enumerate(whole.attentions[0][1]):
        found = torch.cat([indices[layer_idx] for indices in prompt], dim=-1)
        assert torch.equal(found, expected)
    for found, expected in zip(parts.attentions[3:], whole.attentions[1:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))
        assert all(torch.allclose(*pair) for pair in zip(found[0], expected[0], strict=True))


@pytest.mark.parametrize("options", [{"topk": 0}, {"use_external_mind": False}])
def test_a_call_without_memories_has_pairs_too(model, options):
    outputs = generate(model, **INDICES, **options)
    assert outputs.attentions == ((None, (None, None, None)),) * 6


def test_rows_of_other_documents_have_no_indices_also_without_memory_ids():
    model = llama(external_memories=None)
    model.memory.write(MEMORY, document="another")
    for layer in generate(model, **INDICES).attentions[0][1]:
        assert layer.shape == (1, 4, 5 * 3)
        assert (layer == -1).all()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_layers_without_memories_have_weights_where_others_do(kind, tmp_path):
    stock = build(kind).eval()
    stock.save_pretrained(tmp_path)
    memory_ids, prompt = list(range(3, 60)), torch.randint(3, 90, (1, 8))
    model = emt.ExtendedMindForCausalLM.from_pretrained(
        tmp_path, external_memories=memory_ids, topk=4, layers=[1]
    )
    with torch.no_grad():
        outputs = model(prompt, output_attentions=True, output_retrieved_memory_idx=True)
        eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        expected = eager(prompt, output_attentions=True).attentions
    weights, indices = outputs.attentions
    assert [idx is None for idx in indices] == [True, False, True]
    assert [part.shape[-1] for part in weights] == [8, 8 * 4 + 8, 8]
    torch.testing.assert_close(weights[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.logits, logits(model, prompt), rtol=0, atol=1e-4)


@pytest.mark.parametrize("draft", ["assistant_model", "prompt_lookup_num_tokens"])
def test_weights_of_drafted_tokens_are_refused(model, draft):
    options = {
        "assistant_model": LlamaForCausalLM.from_pretrained(LLAMA),
        "prompt_lookup_num_tokens": 3,
    }
    drafting = {draft: options[draft]}
    with pytest.raises(ConfigError, match=f"output_attentions cannot be combined with {draft}"):
        generate(model, output_attentions=True, return_dict_in_generate=True, **drafting)
    assert torch.equal(generate(model, **drafting), generate(model))


# -- checkpoints, copies, attach --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_weights_that_are_renamed_or_joined_while_loading_are(kind, tmp_path):
    stock = build(kind).eval()
    stock.save_pretrained(tmp_path / "stock")
    model = emt.ExtendedMindForCausalLM.from_pretrained(tmp_path / "stock")
    assert torch.equal(logits(model), logits(stock))
    model.save_pretrained(tmp_path / "again")
    again = type(stock).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(stock))


@pytest.mark.parametrize(
    "kind", [emt.ExtendedLlamaForCausalLM, emt.ExtendedMindForCausalLM], ids=["llama", "any"]
)
def test_a_model_survives_pickling(kind):
    model = kind.from_pretrained(LLAMA, external_memories=MEMORY, topk=3)
    expected, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert type(found) is type(model)
    assert torch.equal(logits(found), expected)


def test_a_memory_attached_by_hand_is_the_models(model):
    memory = emt.attach(model, MemoryConfig.published(topk=3))
    assert model.memory is memory
    generate(model)
    model.memory_ids = list(range(90, 150))
    generate(model)
    assert memory.documents[0] == "external_memories"
    assert model.memory_ids == list(range(90, 150))


def test_an_attention_that_is_chosen_later_reads_memories_too(model):
    expected = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
