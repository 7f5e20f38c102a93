"""Passages inside of prompts, and parts of documents, against caches made by hand.

The keys of a part of a document at other positions are the model's own, from a run of the whole
document with `position_ids` that put the part there: what a key is, besides its rotation, depends
on distances only. The cache that results is continued by the plain model. (Learned positions leave
keys as they were read. Linear biases are no part of a key.)
"""

import torch
import pytest
from transformers import DynamicCache

from emt import detach
from emt.model.watch import watching
from emt.passage import Passage
from tests.emt.modes.passage.recalled import (
    SMALL_WINDOWS,
    TOLERANCE,
    largest_error,
    left_padded,
    remembering,
    stepwise,
    tokens,
)
from tests.families import FAMILIES, build

NUM_ROWS = 40
DOCUMENT = tokens(NUM_ROWS, 1)
# Tables of positions have none below 0, where a run for rows at smaller positions begins.
BELOW_ZERO = ["llama", "gemma3_text", "gpt_oss", "phi3", "glm", "deepseek_v3", "mpt", "bloom"]


def kept(model, ids, start=0):
    """Return the keys and values of a run from position `start` on, with no window cut off."""
    cache = DynamicCache()
    places = {}
    if model.config.model_type not in ("mpt", "bloom", "gpt2"):
        places = {"position_ids": torch.arange(start, start + len(ids))[None]}
    logits = model(ids[None], past_key_values=cache, use_cache=True, **places).logits[0]
    return [(layer.keys, layer.values) for layer in cache.layers], logits


def continued(model, parts, prompt):
    """Return the logits of a prompt after parts of runs: (run, first row, last row + 1)."""
    cache = DynamicCache()
    for layer_idx in range(len(parts[0][0])):
        keys, values = (
            torch.cat(
                [layers[layer_idx][kind][:, :, first:stop] for layers, first, stop in parts], 2
            )
            for kind in (0, 1)
        )
        cache.update(keys, values, layer_idx)
    return model(prompt[None], past_key_values=cache, use_cache=True).logits[0]


def expected_in_place(model, head, passages, tail):
    """Return the logits of a prompt with passages between its head and its tail."""
    own, logits = kept(model, head)
    parts, place = [(own, 0, len(head))], len(head)
    for passage in passages:
        run, _ = kept(model, DOCUMENT, place - passage.first)
        parts.append((run, passage.first, passage.stop))
        place += passage.stop - passage.first
    return torch.cat([logits, continued(model, parts, tail)])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@torch.no_grad()
def test_a_part_of_a_document_inside_a_prompt(family):
    model = family.build()
    head, tail, passage = tokens(14, 2), tokens(9, 3), Passage("d", 10, 25)
    expected = expected_in_place(model, head, [passage], tail)
    ids, mask = left_padded([torch.cat([head, tail])])
    plain = model(ids).logits
    memory = remembering(model, DOCUMENT)
    with memory.recalling([passage], at=len(head)):
        assert largest_error(model(ids).logits, [expected]) <= TOLERANCE
        assert largest_error(stepwise(model, ids, mask), [expected]) <= TOLERANCE
    assert largest_error(plain[:, : len(head)], [expected[: len(head)]]) <= TOLERANCE
    assert largest_error(plain[:, len(head) :], [expected[len(head) :]]) > 1e-2


@pytest.mark.parametrize(("model_type", "options"), SMALL_WINDOWS)
@torch.no_grad()
def test_windows_and_chunks_end_at_the_same_positions(model_type, options):
    model = build(model_type, **options)
    head, tail, passage = tokens(14, 2), tokens(30, 3), Passage("d", 10, 17)
    expected = expected_by_mask(model, head, passage, tail)
    memory = remembering(model, DOCUMENT)
    ids, mask = left_padded([torch.cat([head, tail]), tail])
    with memory.recalling([[passage], []], at=[len(head), 0]):
        found = model(ids, attention_mask=mask).logits
        step = stepwise(model, ids, mask)
    with memory.using(enabled=False):
        alone = model(tail[None]).logits[0]
    assert largest_error(found, [expected, alone]) <= TOLERANCE
    assert largest_error(step, [expected, alone]) <= TOLERANCE


def expected_by_mask(model, head, passage, tail):
    """Return logits of head and tail from one run, whose keys in between are the passage's.

    Head, a passage's worth of other tokens, and tail are run at once, the tokens' keys and values
    replaced in each layer; so the model's own windows and chunks are in force.
    """
    num_rows = passage.stop - passage.first
    start = len(head) - passage.first
    rows = {}

    def keep(call):
        rows[call.layer_idx] = tuple(
            part[:, :, passage.first : passage.stop].clone() for part in (call.key, call.value)
        )
        return call.compute()

    def put(call):
        for part, own in zip((call.key, call.value), rows[call.layer_idx], strict=True):
            part[:, :, len(head) : len(head) + num_rows] = own
        return call.compute()

    remembered = remembering(model, DOCUMENT)  # reaches the layers
    with watching(model, keep):
        model(
            DOCUMENT[None],
            position_ids=torch.arange(start, start + NUM_ROWS)[None],
            attention_mask=torch.ones(1, NUM_ROWS),
            use_cache=False,
        )
    with watching(model, put):
        whole = torch.cat([head, DOCUMENT[:num_rows], tail])
        logits = model(whole[None], use_cache=False).logits[0]
    remembered.close()
    detach(model)
    return torch.cat([logits[: len(head)], logits[len(head) + num_rows :]])


@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("model_type", BELOW_ZERO)
@torch.no_grad()
def test_a_part_before_a_prompt_with_and_without_sinks(model_type, with_sinks):
    model = build(model_type)
    prompt, first, stop = tokens(9, 2), 10, 25
    sinks = 4 if with_sinks else 0
    start, _ = kept(model, DOCUMENT)
    part, _ = kept(model, DOCUMENT, sinks - first)
    expected = continued(model, [(start, 0, sinks), (part, first, stop)], prompt)
    memory = remembering(model, DOCUMENT)
    options = {} if with_sinks else {"sinks": False}
    with memory.recalling([Passage("d", first, stop)], **options) as recall:
        assert recall.state.rows.ids.tolist() == [[*range(sinks), *range(first, stop)]]
        assert largest_error(model(prompt[None]).logits, [expected]) <= TOLERANCE


@pytest.mark.parametrize(
    ("first", "expected"),
    [(0, [0, 1, 2, 3, 4, 5]), (2, [0, 1, 2, 3, 4, 5]), (5, [0, 1, 2, 3, 5])],
)
def test_sinks_are_there_once(first, expected):
    memory = remembering(build("llama"), DOCUMENT)
    with memory.recalling([Passage("d", first, 6)]) as recall:
        assert recall.state.rows.ids.tolist() == [expected]
    with memory.recalling([Passage("d", first, 6)], at=3, sinks=True) as recall:
        assert recall.state.rows.ids.tolist() == [expected]
    with memory.recalling([Passage("d", first, 6)], at=3) as recall:
        assert recall.state.rows.ids.tolist() == [list(range(first, 6))]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "falcon", "gpt2", "mpt"])
@torch.no_grad()
def test_several_passages_stand_in_the_order_they_are_given(model_type):
    model = build(model_type)
    head, tail = tokens(34, 2), tokens(9, 3)
    passages = [Passage("d", 30, 38), Passage("d", 5, 15), Passage("d", 15, 18)]
    expected = expected_in_place(model, head, passages, tail)
    other = expected_in_place(model, head, passages[1:] + passages[:1], tail)
    memory = remembering(model, DOCUMENT)
    with memory.recalling(passages, at=len(head)):
        found = model(torch.cat([head, tail])[None]).logits
    assert largest_error(found, [expected]) <= TOLERANCE
    if model_type != "gpt2":  # whose keys do not know where they are put
        assert largest_error(found, [other]) > 1e-3


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt_oss", "gpt2", "mpt", "bloom", "gptj"]
)
@torch.no_grad()
def test_prompts_of_a_batch_have_passages_of_their_own(model_type):
    model = build(model_type)
    memory = remembering(model, DOCUMENT)
    memory.write(tokens(25, 9), document="other")
    prompts = [tokens(length, 2 + length) for length in (12, 5, 9, 7)]
    passages = [
        [Passage("d", 0, 40)],
        [Passage("other", 6, 20), Passage("d", 1, 4)],
        [],
        [Passage("other", 0, 9)],
    ]
    at = [3, 0, 0, 7]
    alone = []
    for prompt, chosen, place in zip(prompts, passages, at, strict=True):
        with memory.recalling(chosen, at=place):
            alone.append(model(prompt[None]).logits[0])
    with memory.using(enabled=False):
        assert torch.equal(alone[2], model(prompts[2][None]).logits[0])
    ids, mask = left_padded(prompts)
    with memory.recalling(passages, at=at):
        assert largest_error(model(ids, attention_mask=mask).logits, alone) <= TOLERANCE
        assert largest_error(stepwise(model, ids, mask), alone) <= TOLERANCE
    with memory.recalling(passages[0], at=[3, 0, 2, 7]):
        found = model(ids, attention_mask=mask).logits
        assert largest_error(found[:1], alone[:1]) <= TOLERANCE
