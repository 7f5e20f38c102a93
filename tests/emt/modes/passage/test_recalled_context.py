"""A document recalled before a prompt is the document in the prompt, on every family.

Expected is the plain model's run over both, which knows nothing of rows, places or masks.
"""

import torch
import pytest

from emt.passage import Passage
from tests.emt.modes.passage.recalled import (
    BACKENDS,
    NUM_ROWS,
    SCALED,
    SMALL_WINDOWS,
    TOLERANCE,
    largest_error,
    left_padded,
    remembering,
    stepwise,
    tokens,
)
from tests.families import FAMILIES, build

LENGTHS = (12, 5, 9)


@torch.no_grad()
def recall_error(model, memory_type="manual", num_rows=NUM_ROWS, lengths=LENGTHS, steps=True):
    document = tokens(num_rows, 1)
    prompts = [tokens(length, 2 + row) for row, length in enumerate(lengths)]
    expected = [model(torch.cat([document, prompt])[None]).logits[0] for prompt in prompts]
    expected = [logits[num_rows:] for logits in expected]
    plain = [model(prompt[None]).logits[0] for prompt in prompts]
    memory = remembering(model, document, memory_type)
    ids, mask = left_padded(prompts)
    with memory.recalling([Passage("d", 0, num_rows)]):
        errors = [largest_error(model(ids, attention_mask=mask).logits, expected)]
        errors.append(largest_error(model(prompts[0][None]).logits, expected[:1]))
        if steps:
            errors.append(largest_error(stepwise(model, ids, mask), expected))
    assert largest_error(plain, expected) > 1e-2  # what is recalled matters
    return max(errors)


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_recalled_document_is_context(family, memory_type):
    assert recall_error(family.build(), memory_type) <= TOLERANCE


@pytest.mark.parametrize(("model_type", "options"), SMALL_WINDOWS)
def test_windows_and_chunks_are_measured_over_the_rows(model_type, options):
    model = build(model_type, **options)
    assert recall_error(model, lengths=(30, 5, 19)) <= TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "falcon"])
def test_eager_and_sdpa_masks_both_work(model_type, implementation):
    model = build(model_type, attn_implementation=implementation)
    assert recall_error(model) <= TOLERANCE


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions(kind):
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **SCALED[kind]})
    assert recall_error(model) <= TOLERANCE


@torch.no_grad()
def test_the_oracle_can_fail():
    model = build("llama")
    document, prompt = tokens(NUM_ROWS, 1), tokens(12, 2)
    expected = model(torch.cat([document, prompt])[None]).logits[0, NUM_ROWS:]
    memory = remembering(model, document)
    with memory.recalling([Passage("d", 1, NUM_ROWS)], sinks=False):
        assert (model(prompt[None]).logits[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@torch.no_grad()
def test_nothing_recalled_is_the_plain_model_bit_for_bit(family, memory_type):
    model = family.build()
    ids, mask = left_padded([tokens(length, length) for length in LENGTHS])
    plain = model(ids, attention_mask=mask).logits
    memory = remembering(model, tokens(NUM_ROWS, 1), memory_type)
    with memory.recalling([]):
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    with memory.recalling([Passage("d", 3, 20)]):
        assert not torch.equal(model(ids, attention_mask=mask).logits, plain)
        with memory.using(enabled=False):
            assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    with memory.using(enabled=False):
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)


@torch.no_grad()
def test_documents_are_read_without_what_is_recalled():
    model = build("llama")
    memory = remembering(model, tokens(NUM_ROWS, 1))
    with memory.recalling([Passage("d", 0, 20)]):
        memory.write(tokens(30, 2), document="inside")
    memory.write(tokens(30, 2), document="outside")
    inside, outside = (memory.backend.catalog.document(name) for name in ("inside", "outside"))
    for layer_idx in range(3):
        rows = [
            memory.backend.fetch(
                layer_idx, torch.arange(document.first_row, document.first_row + 30).expand(2, -1)
            )
            for document in (inside, outside)
        ]
        assert torch.equal(rows[0][0], rows[1][0])
        assert torch.equal(rows[0][1], rows[1][1])


@torch.no_grad()
def test_single_memories_are_retrieved_only_if_asked_for():
    model = build("llama")
    document, prompt = tokens(NUM_ROWS, 1), tokens(12, 2)
    memory = remembering(model, document, layers=None)
    with memory.recording() as steps, memory.recalling([Passage("d", 0, 10)]):
        alone = model(prompt[None]).logits
    assert [set(found.ids.unique().tolist()) for found in steps[0].values()] == [set(range(10))] * 3
    with (
        memory.recording(whole_prompt=True) as steps,
        memory.recalling([Passage("d", 0, 10)], retrieve=True),
    ):
        both = model(prompt[None]).logits
    assert set(steps[0]) == {0, 1, 2}
    assert (both - alone).abs().max() > 1e-3
    weights = steps[0][2].weights[..., :-10]
    assert 0 < float(weights.sum(-1).max()) < 1


@pytest.mark.parametrize("model_type", ["llama", "mpt"])
@torch.no_grad()
def test_rows_retrieved_beside_nothing_are_the_published_method(model_type):
    """With a passage behind the prompt, which no token sees, only retrieval is left."""
    model = build(model_type)
    memory = remembering(model, tokens(NUM_ROWS, 1), layers=None)
    prompt = tokens(12, 2)[None]
    expected = model(prompt).logits
    with memory.recalling([Passage("d", 0, 10)], at=12, retrieve=True):
        assert (model(prompt).logits - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_the_model_says_what_rows_it_attended_to():
    model = build("llama", attn_implementation="eager")
    memory = remembering(model, tokens(NUM_ROWS, 1))
    prompt = tokens(12, 2)[None]
    with memory.recalling([Passage("d", 0, 10)], at=4):
        weights = model(prompt, output_attentions=True).attentions
    for layer in weights:
        assert layer.shape == (1, 4, 12, 10 + 12)
        assert torch.equal(layer[0, :, :4, :10], torch.zeros(4, 4, 10))
        assert float(layer[0, :, 4:, :10].sum(-1).min()) > 0
        assert torch.allclose(layer.sum(-1), torch.ones(1, 4, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mpt", "falcon", "gptj"])
@torch.no_grad()
def test_half_precision_loses_what_the_model_itself_does(model_type, dtype):
    document, prompt = tokens(NUM_ROWS, 1), tokens(12, 2)
    whole = torch.cat([document, prompt])[None]
    exact = build(model_type)(whole).logits[0, NUM_ROWS:]
    model = build(model_type, dtype=dtype)
    own = (model(whole).logits[0, NUM_ROWS:] - exact).abs().mean()
    memory = remembering(model, document)
    with memory.recalling([Passage("d", 0, NUM_ROWS)]):
        found = (model(prompt[None]).logits[0] - exact).abs().mean()
    assert 0 < found <= 1.5 * own


@pytest.mark.parametrize("model_type", ["llama", "gptj"])
@torch.no_grad()
def test_rows_are_read_once_however_many_tokens_follow(model_type, monkeypatch):
    model = build(model_type)
    memory = remembering(model, tokens(NUM_ROWS, 1))
    fetched, fetch = [], memory.backend.fetch_layers
    monkeypatch.setattr(
        memory.backend, "fetch_layers", lambda ids: fetched.append(ids.shape) or fetch(ids)
    )
    with memory.recalling([Passage("d", 3, 20)]):
        model.generate(tokens(5, 2)[None], max_new_tokens=6, num_beams=2, do_sample=False)
    assert len(fetched) == 1
