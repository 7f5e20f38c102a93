"""What recordings say of recalled rows, against the weights of a model with them in its prompt."""

import torch
import pytest

from emt.passage import Passage
from tests.emt.modes.passage.recalled import (
    BACKENDS,
    NUM_ROWS,
    SMALL_WINDOWS,
    left_padded,
    remembering,
    tokens,
)
from tests.families import FAMILIES, build

TOLERANCE = 2e-5
DOCUMENT = tokens(NUM_ROWS, 1)
WHOLE = [Passage("d", 0, NUM_ROWS)]
PROMPTS = [tokens(length, 2 + length) for length in (12, 5, 9)]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@torch.no_grad()
def weights_in_the_prompt(model, prompt):
    """Return layer -> (H, Q, R): what the prompt's tokens give to the document before it."""
    found = model(torch.cat([DOCUMENT, prompt])[None], output_attentions=True).attentions
    return [layer[0, :, NUM_ROWS:, :NUM_ROWS].float() for layer in found]


@torch.no_grad()
def largest_difference(model, prompts, memory_type="manual"):
    """Compare recordings of a left-padded batch with each document and prompt alone, in eager."""
    expected = [weights_in_the_prompt(model, prompt) for prompt in prompts]
    ids, mask = left_padded(prompts)
    memory = remembering(model, DOCUMENT, memory_type)
    with memory.recalling(WHOLE), memory.recording(whole_prompt=True) as recording:
        model(ids, attention_mask=mask)
    assert len(recording) == 1
    assert list(recording[0]) == list(range(len(expected[0])))
    differences = []
    for layer_idx, found in recording[0].items():
        assert found.ids.shape == found.scores.shape == found.weights.shape
        assert torch.equal(found.ids, torch.arange(NUM_ROWS).expand_as(found.ids))
        for row, (prompt, layers) in enumerate(zip(prompts, expected, strict=True)):
            # where layers share their keys, only a prompt's last token may ask
            length = min(len(prompt), found.weights.shape[2])
            part = found.weights[row, :, -length:]
            differences.append(float((part - layers[layer_idx][:, -length:]).abs().max()))
    return max(differences)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_rows_get_what_the_same_tokens_in_the_prompt_would(family):
    model = family.build(attn_implementation="eager")
    assert largest_difference(model, PROMPTS) <= TOLERANCE


@pytest.mark.parametrize(("model_type", "options"), SMALL_WINDOWS)
def test_rows_out_of_a_window_get_nothing(model_type, options):
    model = build(model_type, attn_implementation="eager", **options)
    assert largest_difference(model, [tokens(length, length) for length in (30, 5, 19)]) <= 2e-5


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "falcon"])
@torch.no_grad()
def test_fused_attention_is_recorded_as_eager_is(model_type, memory_type):
    """The weights of eager are returned by the same forward; those of sdpa are not."""
    found = {}
    for implementation in ("eager", "sdpa"):
        model = build(model_type, attn_implementation=implementation)
        memory = remembering(model, DOCUMENT, memory_type)
        options = {"output_attentions": True} if implementation == "eager" else {}
        with (
            memory.recalling([Passage("d", 8, 30)], at=3),
            memory.recording(whole_prompt=True) as r,
        ):
            output = model(PROMPTS[0][None], **options)
        found[implementation] = [r[0][idx].weights for idx in r[0]], output.get("attentions")
    for recorded, fused, own in zip(
        found["eager"][0], found["sdpa"][0], found["eager"][1], strict=True
    ):
        assert recorded.shape == (1, 4, 12, 22)
        assert torch.equal(recorded[:, :, :3], torch.zeros(1, 4, 3, 22))
        torch.testing.assert_close(recorded, own[..., :22], atol=1e-6, rtol=0)
        torch.testing.assert_close(fused, recorded, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_scores_are_cosines_of_queries_and_rows_in_place():
    model = build("llama")
    seen = []
    memory = remembering(model, DOCUMENT)
    attend = memory.attend
    own = model.model.layers[1].self_attn

    def listen(call):
        if call.module is own:
            seen.append(call)
        return attend(call)

    memory.attend = listen
    with memory.recalling([Passage("d", 8, 30)], at=4) as recall, memory.recording() as recording:
        model(PROMPTS[0][None])
    query = seen[0].query[0, :, -1]  # (H, D)
    keys = recall.state.rows.keys[1][0].repeat_interleave(2, 0)  # (H, R, D)
    expected = torch.cosine_similarity(query[:, None], keys, dim=-1)
    torch.testing.assert_close(recording[0][1].scores[0, :, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@torch.no_grad()
def test_recording_does_not_change_what_is_generated(family):
    model = family.build()
    ids, mask = left_padded(PROMPTS)
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    memory = remembering(model, DOCUMENT)
    with memory.recalling([Passage("d", 8, 30)], at=2):
        alone = model.generate(ids, attention_mask=mask, **options)
        with memory.recording() as recording, memory.recording(whole_prompt=True):
            recorded = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(alone.sequences, recorded.sequences)
    for one, other in zip(alone.logits, recorded.logits, strict=True):
        assert torch.equal(one, other)
    assert len(recording) == 6
    assert all(found.weights.shape[2] == 1 for step in recording for found in step.values())


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@torch.no_grad()
def test_each_prompt_has_its_own_rows_and_each_token_its_own_step(way):
    model = build("llama")
    memory = remembering(model, DOCUMENT)
    passages = [[Passage("d", 20, 28), Passage("d", 5, 10)], [], [Passage("d", 30, 33)]]
    rows = [[*range(20, 28), *range(5, 10)], [], [30, 31, 32]]
    ids, mask = left_padded(PROMPTS)
    with memory.recalling(passages, at=1), memory.recording() as recording:
        model.generate(ids, attention_mask=mask, **GREEDY, **way)
    assert len(recording) == 6
    beams = way.get("num_beams", 1)
    for step in recording:
        for found in step.values():
            assert len(found.ids) == 3 * beams
            for row, mine in enumerate(found.ids):
                expected = rows[row // beams]
                assert torch.equal(
                    mine, torch.tensor(expected + [-1] * (13 - len(expected))).expand(4, 1, -1)
                )
            nothing = found.ids < 0
            assert bool((found.weights[nothing] == 0).all())
            assert bool((found.scores[nothing] == -torch.inf).all())
            assert float(found.weights[~nothing].min()) > 0
    assert [[[one.passage for one in prompt] for prompt in put] for put in recording.recalled] == [
        passages
    ]
    assert recording.num_retrieved == 6 * 3 * 4 * beams * (13 + 3)


@pytest.mark.parametrize("whole_prompt", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma2"])
@torch.no_grad()
def test_rows_and_single_memories_share_one_softmax(model_type, whole_prompt):
    model = build(model_type, attn_implementation="eager")
    memory = remembering(model, DOCUMENT, layers=[1, 2], topk=4)
    with (
        memory.recalling([Passage("d", 8, 30)], sinks=False, retrieve=True),
        memory.recording(whole_prompt=whole_prompt) as recording,
    ):
        own = model(PROMPTS[0][None], output_attentions=True).attentions
    for layer_idx, k in ((0, 0), (1, 4), (2, 4)):
        found = recording[0][layer_idx]
        num_queries = 12 if whole_prompt else 1
        assert found.ids.shape == (1, 4, num_queries, k + 22)
        expected = own[layer_idx][:, :, -num_queries:, 12 * k : 12 * k + 22]
        torch.testing.assert_close(found.weights[..., k:], expected, atol=1e-6, rtol=0)
        assert torch.equal(found.ids[0, 0, 0, k:], torch.arange(8, 30))


@torch.no_grad()
def test_the_ids_of_rows_are_kept_once():
    """Of 4 heads, 12 queries and 22 rows a layer, ids are 22 numbers."""
    model = build("llama")
    memory = remembering(model, DOCUMENT)
    passage = Passage("d", 8, 30)
    with memory.recalling([passage], at=2), memory.recording(whole_prompt=True) as recording:
        model(PROMPTS[0][None])
    assert recording[0][0].ids.shape == (1, 4, 12, 22)
    assert recording[0][0].ids.untyped_storage().nbytes() == 22 * 8
    assert recording[0][0].weights.untyped_storage().nbytes() == 4 * 12 * 22 * 4
