"""The router: its hits against brute force, and the passages that it chooses by them."""

import torch
import numpy as np
import pytest

from emt import MemoryConfig, Passage, attach
from emt.errors import ConfigError
from emt.profiles.ranking import HeadRanking
from emt.routing.evidence import best_windows
from emt.routing.head_search import TOPK
from emt.routing.values import ValueIndex
from tests.emt.routing.worlds import (
    BACKENDS,
    NAMES,
    ROWS,
    asked,
    attached_model,
    build,
    chosen,
    document,
    heads_of,
    profile_of,
    routing,
)
from tests.emt.words import word_tokenizer

HEADS = ((0, 1), (0, 0), (2, 3), (1, 2))


@pytest.fixture(scope="module", params=BACKENDS)
def world(request):
    """A model, and its memory of either backend that no test changes."""
    model = build("llama")
    return model, routing(model, request.param, heads=HEADS)


def queries_by_hand(model, prompt, layer_idx, distance):
    """Return a llama layer's unit queries (H, T, D) at a position, from what goes into it."""
    outputs = []
    layer = model.model.layers[layer_idx].self_attn
    hook = layer.q_proj.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(prompt[None])
    hook.remove()
    query = outputs[0][0].view(len(prompt), 4, 16).transpose(0, 1)
    half = torch.arange(0, 16, 2) / 16
    angle = distance / 10_000.0**half
    angle = torch.cat([angle, angle])
    rotated = torch.cat([-query[..., 8:], query[..., :8]], dim=-1)
    query = query * angle.cos() + rotated * angle.sin()
    return query / query.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("names", [None, ["two"], ["one", "three"]])
def test_hits_are_those_of_brute_force(world, names):
    model, memory = world
    profile, prompt = memory.profile, asked(1)
    scope = None if names is None else memory.backend.catalog.scope(names)
    query_tokens = list(range(2, len(prompt)))
    hits = heads_of(memory).hits(prompt, query_tokens, memory.backend, scope=scope)
    documents = [memory.backend.catalog.document(name) for name in names or NAMES]
    allowed = np.concatenate(
        [part.first_row + np.arange(len(part.row_tokens)) for part in documents]
    )
    expected = 0.0
    with memory.using(enabled=False):
        for number, (layer_idx, head) in enumerate(HEADS):
            query = queries_by_hand(model, prompt, layer_idx, profile.distance)[head, 2:]
            ids = torch.from_numpy(allowed)
            keys, _ = memory.backend.fetch(layer_idx, ids.expand(2, -1))
            keys = keys[head // 2] / keys[head // 2].norm(dim=-1, keepdim=True)
            scores = (query - profile.means[number]) @ keys.T
            best = scores.topk(min(TOPK, len(allowed)), dim=1).values
            expected += (best - best[:, -1:]).sum().item()
    assert hits.num_queries == len(query_tokens) * len(HEADS)
    assert hits.excess.sum() == pytest.approx(expected, rel=1e-4)
    assert set(hits.rows.tolist()) <= set(allowed.tolist())


def test_passages_are_around_the_best_windows(world):
    _, memory = world
    prompt = asked(1)
    hits = heads_of(memory).hits(prompt, range(len(prompt)), memory.backend)
    (best,) = best_windows(hits, 1, min_distance=1)
    with memory.using(candidates=0, routing="heads"):
        routed = memory.route(prompt)
    assert routed.score == best.score
    assert routed.passages[0].score == pytest.approx(best.score, abs=1e-4)
    first = routed.passages[0].passage
    start = memory.backend.catalog.document(first.document).first_row
    assert start + first.first <= best.peak < start + first.stop


@pytest.mark.parametrize("memory_type", BACKENDS)
def test_words_route_until_there_is_a_profile(memory_type, tmp_path, monkeypatch):
    def no_profile(*args, **options):
        raise ConfigError("heads cannot be ranked.")

    monkeypatch.setattr(HeadRanking, "rank_built_in", no_profile)
    model = build("llama")
    options = {"path": tmp_path / "store", **BACKENDS[memory_type]}
    config = MemoryConfig.published(
        mode="passage",
        routing="both",
        memory_type=memory_type,
        remove_special_ids=False,
        passage_rows=ROWS,
        relevance=None,
        candidates=0,
        **options,
    )
    memory = attach(model, config, tokenizer=word_tokenizer())
    for number, name in enumerate(NAMES):
        memory.write(document(number), document=name)
    memory.save()
    index = memory.backend.catalog.setting("index")
    assert index is None or index["heads"] == {}
    for number, name in enumerate(NAMES):
        prompt = document(number)[20:30]
        routed = memory.route(prompt)
        assert routed.passages[0].passage.document == name
        assert routed.passages[0].score == pytest.approx(routed.score, abs=1e-4)
        with memory.using(routing="words"):
            assert memory.route(prompt) == routed
    recalled = chosen(model, [asked(1)])
    with memory.using(enabled=False):
        assert chosen(model, [asked(1)]) != recalled
    memory.keep_profile(profile_of(build("llama")))
    memory.save()
    index = memory.backend.catalog.setting("index")
    assert index is None or index["heads"] == {"0": [0], "2": [1]}


def test_each_of_many_short_documents_is_found_by_its_own_words():
    memory = routing(build("llama"), tokenizer=word_tokenizer(), max_passages=3, candidates=0)
    memory.clear()
    owners, things = range(10, 30), range(40, 50)
    facts = {f"{owner}-{thing}": (owner, thing) for owner in owners for thing in things}
    memory.write_all((name, f"w{a} w90 w{b} w91 w92") for name, (a, b) in facts.items())
    for name in list(facts)[::23]:
        owner, thing = facts[name]
        question = torch.tensor([91, 90, thing, owner])
        with memory.using(routing="words"):
            assert memory.route(question).passages[0].passage == Passage(name, 0, 6)
        with memory.using(routing="both"):
            passages = [routed.passage for routed in memory.route(question).passages]
        assert Passage(name, 0, 6) in passages
        assert len({passage.document for passage in passages}) == 3


def test_values_alone_find_passages_without_tokenizer_and_profile():
    model = build("llama")
    config = MemoryConfig.published(
        mode="passage", remove_special_ids=False, passage_rows=ROWS, candidates=0
    )
    memory = attach(model, config)
    for number, name in enumerate(NAMES):
        memory.write(document(number), document=name)
    for number in range(len(NAMES)):
        prompt = document(number)[20:60]
        runs, scores = ValueIndex(attached_model(memory)).scores(prompt, memory.backend)
        (best,) = runs.windows(scores, 1, min_distance=1)
        (owner,) = memory.backend.catalog.document_of_rows([best.peak]).values()
        routed = memory.route(prompt)
        assert (routed.passages[0].passage.document, routed.score) == (owner, best.score)
        with memory.using(routing="values"):
            assert memory.route(prompt) == routed
    for setting in ("words", "both", "heads"):
        with memory.using(routing=setting), pytest.raises(ConfigError, match=setting):
            memory.route(prompt)
    plain = chosen(model, [asked(1)])
    with memory.using(mode="auto"):
        in_token_mode = chosen(model, [asked(1)])
    with memory.using(mode="token"):
        assert chosen(model, [asked(1)]) == in_token_mode != plain
