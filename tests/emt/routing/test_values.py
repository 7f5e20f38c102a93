"""Routing by values: the mean values of runs, as the model computes them, near a question's."""

import math

import torch
import numpy as np
import pytest

from emt import attach
from emt.routing import values
from emt.routing.values import ValueIndex
from tests.emt.routing.worlds import attached_model, build, document, routing, tokens


def index_of(memory):
    return ValueIndex(attached_model(memory))


def last_layers(model):
    num_layers = model.config.num_hidden_layers
    return range(num_layers - math.ceil(num_layers / 4), num_layers)


def values_of(model, token_ids):
    """Return the outputs of the value projections of the last quarter of layers, (layers, T, D)."""
    seen = []
    hooks = [
        model.model.layers[layer].self_attn.v_proj.register_forward_hook(
            lambda _module, _args, output: seen.append(output[0])
        )
        for layer in last_layers(model)
    ]
    with torch.no_grad():
        model.model(token_ids[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).numpy()


def test_scores_are_cosines_of_mean_values():
    memory, model = routing(build("llama"), carry_context=True), build("llama")
    question = tokens(9, 90)
    runs, scores = index_of(memory).scores(question, memory.backend)
    query = values_of(model, question)[:, 1:].mean(axis=1)
    means = []
    for number in range(3):
        of_rows = values_of(model, document(number))
        for start in range(0, max(of_rows.shape[1] - 32, 1), 32):
            means.append(of_rows[:, max(start, 1) : start + 64].mean(axis=1))
    means = np.stack(means, axis=1)  # (layers, r, D)
    means -= means.mean(axis=1, keepdims=True)
    cosines = np.einsum("lrd,ld->lr", means, query)
    cosines /= np.linalg.norm(means, axis=-1) * np.linalg.norm(query, axis=-1)[:, None]
    assert len(runs.starts) == means.shape[1]
    np.testing.assert_allclose(scores, cosines.mean(axis=0).clip(0, 1), atol=1e-4)


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_documents_that_come_and_go_are_as_if_indexed_anew(memory_type, monkeypatch):
    memory = routing(build("llama"), memory_type)
    index, question = index_of(memory), document(1)[10:20]
    index.scores(question, memory.backend)
    memory.write(document(5), document="new")
    memory.remove("one")
    read = []
    own = values._stored_values
    monkeypatch.setattr(
        values, "_stored_values", lambda rows, *rest: read.append(rows) or own(rows, *rest)
    )
    runs, scores = index.scores(question, memory.backend)
    assert {len(rows) for rows in read} == {len(document(5))}  # no other is read again
    anew, expected = index_of(memory).scores(question, memory.backend)
    np.testing.assert_array_equal(runs.starts, anew.starts)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_a_memory_without_documents_or_of_one():
    memory = routing(build("llama"))
    memory.clear()
    index = index_of(memory)
    assert index.scores(tokens(5, 1), memory.backend)[1].tolist() == []
    memory.write(tokens(3, 1), document="short")
    assert index.scores(tokens(1, 1), memory.backend)[1].tolist() == [0]


def test_a_question_longer_than_the_positions_is_asked_by_its_end():
    memory = attach(build("gpt2", n_positions=32))
    memory.write_all([("a", document(1)), ("b", document(2))])
    index, question = index_of(memory), tokens(40, 4)
    _, scores = index.scores(question, memory.backend)
    np.testing.assert_array_equal(scores, index.scores(question[-32:], memory.backend)[1])


def test_of_many_layers_eight_have_means():
    memory = routing(build("llama", num_hidden_layers=40))
    assert index_of(memory)._layers == [30, 31, 33, 34, 35, 36, 38, 39]


@pytest.mark.parametrize("names", [["one"], ["two", "three"], []])
def test_values_in_a_scope_are_as_if_there_were_nothing_else(names):
    memory, question = routing(build("llama")), document(2)[:20]
    index, catalog = index_of(memory), memory.backend.catalog
    whole, _ = index.scores(question, memory.backend)
    scope = catalog.scope(names)
    runs, scores = index.scores(question, memory.backend, scope)
    chosen = np.isin(whole.documents, [catalog.document(name).first_row for name in names])
    np.testing.assert_array_equal(runs.starts, whole.starts[chosen])
    memory.remove(*({"one", "two", "three"} - set(names)))
    alone = index_of(memory).scores(question, memory.backend)[1]
    np.testing.assert_array_equal(scores, alone)
