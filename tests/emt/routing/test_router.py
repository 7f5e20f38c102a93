"""The router: its hits against brute force, and words."""

import math

import torch
import numpy as np
import pytest

from emt.errors import ConfigError
from emt.passage import Passage
from emt.routing import words as words_module
from emt.routing.evidence import Hits, Window, windows_of
from emt.routing.relevance import Relevance
from emt.routing.relevance_store import RelevanceStore
from emt.routing.router import TOPK, _passages
from emt.routing.words import Words
from memory_backends import Scope
from tests.emt.routing.worlds import (
    BACKENDS,
    NAMES,
    asked,
    build,
    document,
    router_of,
    routing,
    tokens,
)
from tests.emt.words import word_tokenizer


def queries_by_hand(model, prompt, layer_idx, distance):
    """Return a llama layer's unit queries (H, T, D) at a position, from what goes into it."""
    seen = []
    layer = model.model.layers[layer_idx].self_attn
    hook = layer.q_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(prompt[None])
    hook.remove()
    query = seen[0][0].view(len(prompt), 4, 16).transpose(0, 1)
    half = torch.arange(0, 16, 2) / 16
    angle = distance / 10_000.0**half
    angle = torch.cat([angle, angle])
    rotated = torch.cat([-query[..., 8:], query[..., :8]], dim=-1)
    query = query * angle.cos() + rotated * angle.sin()
    return query / query.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("names", [None, ["two"], ["one", "three"]])
def test_hits_are_those_of_brute_force(memory_type, names):
    model = build("llama")
    heads = ((0, 1), (0, 0), (2, 3), (1, 2))
    memory = routing(model, memory_type, heads=heads)
    profile, prompt = memory.profile, asked(1)
    scope = None if names is None else memory.backend.catalog.scope(names)
    router = router_of(memory)
    asking = list(range(2, len(prompt)))
    found = router.hits(prompt, asking, memory.backend, scope=scope)
    spans = [memory.backend.catalog.document(name) for name in names or NAMES]
    allowed = np.concatenate(
        [np.arange(one.first_row, one.first_row + len(one.row_tokens)) for one in spans]
    )
    expected = {}
    with memory.using(enabled=False):
        for number, (layer_idx, head) in enumerate(heads):
            query = queries_by_hand(model, prompt, layer_idx, profile.distance)[head, 2:]
            ids = torch.from_numpy(allowed)
            keys, _ = memory.backend.fetch(layer_idx, ids.expand(2, -1))
            keys = keys[head // 2] / keys[head // 2].norm(dim=-1, keepdim=True)
            scores = (query - profile.means[number]) @ keys.T
            best = scores.topk(min(TOPK, len(allowed)), dim=1)
            expected[layer_idx, head] = (best.values - best.values[:, -1:]).sum().item()
    assert found.num_askers == len(asking) * len(heads)
    assert found.excess.sum() == pytest.approx(sum(expected.values()), rel=1e-4)
    assert set(found.rows.tolist()) <= set(allowed.tolist())


@pytest.mark.parametrize("memory_type", BACKENDS)
def test_passages_are_around_the_best_windows(memory_type):
    memory = routing(build("llama"), memory_type)
    router = router_of(memory)
    prompt = asked(1)
    hits = router.hits(prompt, list(range(len(prompt))), memory.backend)
    best = windows_of(hits, 1, apart=1)[0]
    routed = memory.route(prompt)
    assert routed.score == best.share
    assert routed.passages[0].score == pytest.approx(best.share, abs=1e-4)
    first = routed.passages[0].passage
    start = memory.backend.catalog.document(first.document).first_row
    assert start + first.first <= best.peak < start + first.stop
    assert isinstance(hits, Hits)


def test_what_stands_too_little_above_others_is_told_and_nothing_recalled():
    model = build("llama")
    memory = routing(model)
    free = memory.route(asked(1))
    assert free.relevance is None
    others = Relevance(len(memory), math.log(free.score) - 0.5, 0.0, 0.25)
    about = {"profile": memory.profile.fingerprint, "written": len(memory)}
    memory.backend.set_setting("relevance", {**others.to_json(), **about})
    memory._modes.routing._relevance = RelevanceStore()
    for least, passages in ((1.9, free.passages), (2.1, ()), (None, free.passages)):
        with memory.using(relevance=least):
            routed = memory.route(asked(1))
        assert routed.passages == passages
        assert routed.score == free.score
        assert routed.relevance == (None if least is None else pytest.approx(2, abs=1e-5))


def passages_of_places(memory, peaks, num_rows=64, num_passages=2):
    """Return what is recalled around rows of a memory's documents, best first."""
    first = {name: memory.backend.catalog.document(name).first_row for name in NAMES}
    windows = [Window(first[name] + row, share) for name, row, share in peaks]
    found = _passages(windows, memory.backend, num_rows, num_passages)
    return [(one.passage, one.score) for one in found]


def test_a_place_that_was_removed_gives_way_to_the_next():
    memory = routing(build("llama"))
    memory.backend.remove([40])
    found = passages_of_places(memory, [("one", 40, 0.5), ("one", 20, 0.2)], num_passages=1)
    assert found == [(Passage("one", 0, 40), 0.2)]


def test_removed_rows_between_places_part_them_and_both_are_recalled():
    memory = routing(build("llama"))
    peaks = [("two", 20, 0.1), ("two", 50, 0.3)]
    assert passages_of_places(memory, peaks) == [(Passage("two", 0, 64), 0.3)]
    start = memory.backend.catalog.document("two").first_row
    memory.backend.remove([start + 40])
    parts = [(Passage("two", 0, 40), 0.1), (Passage("two", 41, 64), 0.3)]
    assert passages_of_places(memory, peaks) == parts
    assert passages_of_places(memory, peaks, num_passages=1) == parts[:1]


def test_more_places_where_documents_are_short():
    memory = routing(build("llama"))
    peaks = [("one", 20, 0.5), ("one", 60, 0.4), ("two", 30, 0.3), ("three", 40, 0.2)]
    one, two = Passage("one", 0, 70), Passage("two", 0, 79)
    # All of the first, which both places are in, is 70 rows: too little of 160, but not of 80.
    assert passages_of_places(memory, peaks, 160) == [(one, 0.5), (two, 0.3)]
    assert passages_of_places(memory, peaks, 80) == [(one, 0.5)]


def with_words():
    model = build("llama")
    return routing(model, tokenizer=word_tokenizer(), relevance=None)


@pytest.mark.parametrize("mode", ["words", "both"])
def test_words_find_their_document(mode):
    pytest.importorskip("bm25s")
    memory = with_words()
    for number, name in enumerate(NAMES):
        with memory.using(routing=mode, passage_rows=64):  # room for more than one place
            routed = memory.route(document(number)[20:30])
        names = [one.passage.document for one in routed.passages]
        assert name in names if mode == "both" else names[0] == name
        assert (routed.score > 0) == (mode == "both")


@pytest.mark.parametrize("mode", ["words", "both"])
def test_words_stay_inside_of_the_scope(mode):
    pytest.importorskip("bm25s")
    memory = with_words()
    for number in range(3):
        for name in NAMES:
            with memory.using(routing=mode, documents=[name]):
                routed = memory.route(document(number)[20:30])
            assert {one.passage.document for one in routed.passages} <= {name}
        with memory.using(routing=mode, documents=[]):
            assert memory.route(document(number)[20:30]).passages == ()


def test_words_are_those_of_the_memory_as_it_is():
    pytest.importorskip("bm25s")
    memory = with_words()
    with memory.using(routing="words"):
        assert memory.route(document(0)[20:30]).passages[0].passage.document == "one"
        memory.write(tokens(70, 99), document="one", replace=True)  # as long as before
        memory.write(document(0), document="four")
        assert memory.route(document(0)[20:30]).passages[0].passage.document == "four"
        memory.remove("four")
        found = {one.passage.document for one in memory.route(document(0)[20:30]).passages}
        assert "four" not in found


def test_words_that_are_nowhere():
    pytest.importorskip("bm25s")
    memory = with_words()
    memory.clear()
    memory.write(torch.arange(10, 40), document="d")
    found = Words(memory.backend, memory.tokenizer)
    for question in ("w90 w91", "", "the of and", "unheard"):
        assert found.windows(question, 3, apart=8) == []
    assert found.windows("w12", 3, apart=8)[0].share == 1
    assert found.windows("w12", 3, apart=8, scope=Scope(())) == []
    with memory.using(routing="words"):
        assert memory.route(torch.tensor([90, 91])).passages == ()


def test_words_without_their_library(monkeypatch):
    memory = with_words()

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(words_module.importlib, "import_module", missing)
    with memory.using(routing="words"), pytest.raises(ConfigError, match=r"needs bm25s.*pip"):
        memory.route(tokens(5, 1))
    assert memory.route(tokens(5, 1)).passages
