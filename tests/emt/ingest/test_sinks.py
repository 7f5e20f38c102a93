"""Attention sinks, found among made-up keys and by a real model, against plain loops."""

import torch
import numpy as np
import pytest

from emt.ingest.encoder import encode
from emt.ingest.sinks import FACTOR, NUM_QUERIES, SinkFinder
from emt.ingest.windows import Windows
from tests.emt.ingest.encoding import random_ids, row_reader
from tests.families import build

SCALING = {0: 0.25, 1: 0.5}


def made_up(num_rows, sinks, *, strength=6.0, heads=(2, 4), seed=0):
    """Return random keys and queries of two layers; all queries look for the sinks."""
    generator = torch.Generator().manual_seed(seed)
    keys, queries = {}, {}
    for layer in SCALING:
        key = torch.randn(heads[0], num_rows, 8, generator=generator)
        query = torch.randn(heads[1], num_rows, 8, generator=generator)
        key[..., 0], query[..., 0] = 0.0, 4.0
        key[:, sinks, 0] = strength / (4.0 * SCALING[layer])  # added to every logit
        keys[layer], queries[layer] = key, query
    return keys, queries


def by_loops(first, rows, queries):
    """Return which of a window's rows are sinks, from the keys of the first window and its own."""
    num_first, num_rows = first[0].shape[1], rows[0].shape[1]
    sample = np.linspace(1, num_first - 1, min(NUM_QUERIES, num_first - 1)).astype(int)
    result = []
    for row in range(num_rows):
        of_queries = []
        for token in sample:
            shares = []
            for layer, scaling in SCALING.items():
                group = queries[layer].shape[0] // first[layer].shape[0]
                for head in range(queries[layer].shape[0]):
                    query = queries[layer][head, token].double()
                    logits = first[layer][head // group].double() @ query * scaling
                    own = rows[layer][head // group, row].double() @ query * scaling
                    shares.append(min(1.0, float(own.exp() / logits.exp().sum())))
            of_queries.append(sum(shares) / len(shares))
        median = sorted(of_queries)[(len(of_queries) - 1) // 2]
        others = (1 - median) / max(num_first - 1, 1)
        result.append(num_first > 1 and median > FACTOR * others)
    return result


@pytest.mark.parametrize("heads", [(2, 4), (1, 4), (4, 4), (1, 1)])
@pytest.mark.parametrize("num_rows", [90, 33, 12])
def test_rows_that_all_queries_look_for_are_sinks(num_rows, heads):
    keys, queries = made_up(num_rows, [0, 7], heads=heads)
    found = SinkFinder().find(keys, queries, SCALING)
    assert found.dtype == bool
    assert np.flatnonzero(found).tolist() == [0, 7]
    assert found.tolist() == by_loops(keys, keys, queries)


@pytest.mark.parametrize("strength", [1.0, 2.0, 2.5, 3.0])
def test_weak_sinks_as_by_loops(strength):
    keys, queries = made_up(60, [3, 20, 21, 40], strength=strength, seed=1)
    found = SinkFinder().find(keys, queries, SCALING)
    assert found.tolist() == by_loops(keys, keys, queries)


def test_a_row_that_a_third_of_the_queries_look_for_is_none():
    keys, queries = made_up(60, [0])
    for layer in SCALING:
        keys[layer][:, 30, 1] = 30.0
        queries[layer][:, :20, 1] = 3.0
        queries[layer][:, 20:, 1] = 0.0
    finder = SinkFinder()
    assert np.flatnonzero(finder.find(keys, queries, SCALING)).tolist() == [0]
    for layer in SCALING:
        queries[layer][..., 1] = 3.0  # now all of them do
    assert np.flatnonzero(SinkFinder().find(keys, queries, SCALING)).tolist() == [30]


def test_rows_of_later_windows_are_compared_with_the_first():
    first, queries = made_up(70, [0])
    later, others = made_up(25, [9], seed=5)
    finder = SinkFinder()
    finder.find(first, queries, SCALING)
    found = finder.find(later, others, SCALING)
    assert np.flatnonzero(found).tolist() == [9]
    assert found.tolist() == by_loops(first, later, queries)
    parts = [
        finder.find({layer: key[:, part] for layer, key in later.items()}, others, SCALING)
        for part in (slice(0, 3), slice(3, 4), slice(4, 25))
    ]
    assert np.concatenate(parts).tolist() == found.tolist()  # however windows are cut


@pytest.mark.parametrize("num_rows", range(1, 9))
@pytest.mark.parametrize("strength", [0.0, 8.0, 40.0])
def test_some_rows_of_a_tiny_document_stay_findable(num_rows, strength):
    for seed in range(20):
        for sinks in ([0], list(range(num_rows))):
            keys, queries = made_up(num_rows, sinks, strength=strength, seed=seed)
            found = SinkFinder().find(keys, queries, SCALING)
            assert not found.all()
            if num_rows > 1 and strength == 40.0 and sinks == [0]:
                assert np.flatnonzero(found).tolist() == [0]


def test_a_window_without_rows_has_no_sinks():
    keys, queries = made_up(20, [0])
    finder = SinkFinder()
    for count in (0, 20, 0):
        window = [
            {layer: part[:, :count] for layer, part in each.items()} for each in (keys, queries)
        ]
        assert np.flatnonzero(finder.find(*window, SCALING)).tolist() == [0] * bool(count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    keys, queries = made_up(50, [0, 11])
    keys, queries = (
        {layer: part.to(dtype) for layer, part in each.items()} for each in (keys, queries)
    )
    exact = [{layer: part.float() for layer, part in each.items()} for each in (keys, queries)]
    found = SinkFinder().find(keys, queries, SCALING)
    assert found.tolist() == SinkFinder().find(*exact, SCALING).tolist()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mpt", "falcon", "gpt2"])
@pytest.mark.parametrize("carry_context", [False, True])
def test_documents_are_marked_by_what_their_rows_hold(model_type, carry_context):
    reader, token_ids = row_reader(build(model_type), {5}), random_ids(47)
    runs = list(encode(reader, token_ids, Windows(8, 24, carry_context)))
    assert len(runs) > 1
    scaling = reader.forward(token_ids[None, :5]).scaling
    finder = SinkFinder()
    for run in runs:
        assert run.sinks.tolist() == finder.find(run.keys, run.queries, scaling).tolist()


@torch.no_grad()
def test_scaling_is_that_of_the_model():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    assert set(row_reader(model).forward(random_ids(5)[None]).scaling.values()) == {0.7}


def test_logits_of_any_size():
    keys, queries = made_up(40, [0], strength=3000.0)
    found = SinkFinder().find(keys, queries, SCALING)
    assert np.flatnonzero(found).tolist() == [0]
