"""Gains over neutral passages: which passages these are, what is taken off, and when."""

import math

import torch
import pytest

from emt.passage import Passage
from emt.routing.judging import SURE
from emt.routing.neutral import gain_over_neutral, neutral_passages
from tests.emt.routing.worlds import NAMES, asked, build, router_of, routing

LENGTH = 12


@pytest.fixture(scope="module")
def memory():
    model = build("llama")
    yield routing(model)
    del model  # which the memory does not keep


def of(name, first=0):
    return Passage(name, first, first + LENGTH)


@pytest.mark.parametrize("name", NAMES)
def test_neutral_passages_are_of_other_documents(memory, name):
    found = neutral_passages(of(name), LENGTH, memory.backend, None)
    assert len(found) == 4
    assert {each.stop - each.first for each in found} == {LENGTH}
    assert {each.document for each in found} == set(NAMES) - {name}


def test_neutral_passages_are_in_the_scope(memory):
    two = memory.backend.catalog.scope(["one", "two"])
    found = neutral_passages(of("one"), LENGTH, memory.backend, two)
    assert {each.document for each in found} == {"two"}
    alone = memory.backend.catalog.scope(["one"])
    assert neutral_passages(of("one"), LENGTH, memory.backend, alone) == []


def test_what_tokens_gain_after_any_passage_is_taken_off(memory):
    gains = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.5, 0.5, 0.5, 5.0]])
    after = torch.tensor(
        [[2.0, -1.0, 1.0, 0.5], [1.0, -3.0, 1.0, 0.0], [1.0, -1.0, 1.0, 0.0], [0.0, -1.0, 0.5, 0.0]]
    )

    def gains_after(passages):
        return after[: len(passages)]

    passages = [of("one"), of("one", 20)]
    found = gain_over_neutral(gains, passages, gains_after, memory.backend, None)
    mixed = [max(math.log(sum(map(math.exp, token)) / 4), 0) for token in after.T.tolist()]
    left = [[gain - off for gain, off in zip(row, mixed, strict=True)] for row in gains.tolist()]
    expected = max(sum(sorted(row)[-3:]) / 3 for row in left)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found < 2.0  # the plain mean of the three largest


def test_without_another_document_the_gain_is_that_over_none(memory):
    gains = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    scope = memory.backend.catalog.scope(["one"])
    assert gain_over_neutral(gains, [of("one")], pytest.fail, memory.backend, scope) == 2.0


@pytest.mark.parametrize(
    ("gain", "relevance", "calls"),
    [
        (1.0, 2.0, 1),  # below the threshold over no passage, so over neutral ones, too
        (2.5, 2.0, 2),
        (2.5, None, 2),
        (SURE + 0.5, 2.0, 1),  # large enough
    ],
)
def test_neutral_passages_are_asked_about_in_doubt_only(memory, gain, relevance, calls):
    asked_about = []

    def judge(asking, passages, backend, *, beside=None):
        asked_about.append([passage.document for passage in passages])
        after = gain if len(asked_about) == 1 else gain - 1.75  # then of neutral ones
        return torch.tensor([[after] * 8] * len(passages) + [[0.0] * 8])

    config = memory.config.replace(relevance=relevance, candidates=1)
    prompt = asked(1)
    routed = router_of(memory).route(prompt, memory.backend, config, judge=judge)
    assert len(asked_about) == calls
    if calls == 2:
        assert not set(asked_about[0]) & set(asked_about[1])
        assert routed.relevance == pytest.approx(1.75)
        assert bool(routed.passages) == (relevance is None)
    else:
        assert routed.relevance == pytest.approx(gain)
        assert bool(routed.passages) == (gain > 2.0)
