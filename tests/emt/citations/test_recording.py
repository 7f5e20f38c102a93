"""What is recorded: for each step and layer, the rows of the query that chose the token."""

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import MemoryUseError
from emt.passage import Retrieved
from tests.families import build

PROMPT = torch.tensor([[5, 9, 33, 60]])
NEW = 6


@pytest.fixture
def remembering():
    model = build("llama")
    memory = attach(model, MemoryConfig.published(topk=4, layers=[0, 2]))
    memory.write(list(range(10, 60)), document="d")
    return model, memory


def generate(model):
    return model.generate(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def test_one_step_a_new_token_with_the_query_that_chose_it(remembering):
    model, memory = remembering
    with memory.recording() as recorded:
        tokens = generate(model)
    assert len(recorded) == NEW == len(list(recorded))
    for step in recorded:
        assert list(step) == [0, 2]
        for idx, layer in step.items():
            assert layer.layer_idx == idx
            assert layer.ids.shape == layer.scores.shape == layer.weights.shape == (1, 4, 1, 4)
    with memory.recording(whole_prompt=True) as again, torch.no_grad():
        model(tokens[:, :-1])
    whole = again[0][2]
    assert whole.ids.shape == (1, 4, PROMPT.shape[1] + NEW - 1, 4)
    for number, step in enumerate(recorded):
        query = PROMPT.shape[1] - 1 + number
        assert torch.equal(step[2].ids[:, :, 0], whole.ids[:, :, query])
        torch.testing.assert_close(
            step[2].weights[:, :, 0], whole.weights[:, :, query], atol=1e-6, rtol=0
        )


def test_values_are_ordered_and_shares(remembering):
    model, memory = remembering
    with memory.recording() as recorded:
        generate(model)
    for step in recorded:
        for layer in step.values():
            assert (layer.scores.diff(dim=-1) <= 0).all()
            assert (layer.scores.abs() <= 1 + 1e-6).all()
            assert (layer.weights > 0).all()
            assert (layer.weights.sum(-1) < 1).all()
            assert layer.ids.min() >= 0
            assert layer.ids.max() < 50


def test_whole_prompts_only_if_asked(remembering):
    model, memory = remembering
    with memory.recording(whole_prompt=True) as whole, memory.recording() as last:
        generate(model)
    assert [step[0].ids.shape[2] for step in whole] == [4, *[1] * (NEW - 1)]
    assert torch.equal(whole[0][0].ids[:, :, -1:], last[0][0].ids)


def test_recording_ends_with_its_block(remembering):
    model, memory = remembering
    with memory.recording() as recorded:
        model(PROMPT)
    model(PROMPT)
    assert len(recorded) == 1
    with pytest.raises(ZeroDivisionError), memory.recording() as interrupted:
        raise ZeroDivisionError
    model(PROMPT)
    assert len(interrupted) == 0


def test_nothing_is_recorded_without_memory(remembering):
    model, memory = remembering
    with memory.recording() as recorded, memory.using(enabled=False):
        generate(model)
    assert len(recorded) == 0


def test_recording_changes_no_logits(remembering):
    model, memory = remembering
    with torch.no_grad():
        before = model(PROMPT).logits
        with memory.recording():
            assert torch.equal(model(PROMPT).logits, before)


def test_a_layer_seen_again_begins_a_step_and_prompts_are_not_kept_alive():
    recording = attach(build("llama")).new_recording()
    prompt = torch.arange(24.0).view(1, 2, 4, 3)
    for layer in (1, 3, 1, 3):
        recording.add(Retrieved(layer, prompt.long(), prompt, prompt.requires_grad_()))
    assert [list(step) for step in recording] == [[1, 3], [1, 3]]
    kept = recording[0][1].weights
    assert kept.tolist() == [[[[9.0, 10.0, 11.0]], [[21.0, 22.0, 23.0]]]]
    assert not kept.requires_grad
    assert kept.untyped_storage().nbytes() == kept.numel() * 4


@torch.no_grad()
@pytest.mark.parametrize("batches", [(1, 2), (2, 1)])
def test_a_sequence_must_be_in_each_forward_by_hand(remembering, batches):
    model, memory = remembering
    with memory.recording() as recorded:
        for batch in batches:
            model(PROMPT.expand(batch, -1))
    assert recorded.citations(sequence=0)
    with pytest.raises(MemoryUseError, match=r"sequence must be 0 to 0, .* got 1"):
        recorded.citations(sequence=1)
