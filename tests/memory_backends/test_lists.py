"""Inverted lists that fit the queries, and how many of them to search."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from memory_backends.faiss.building import add_rows, calibrate
from memory_backends.faiss.calibration import Nearest, efforts, least_effort
from memory_backends.faiss.index import new_index, search, search_parameters
from memory_backends.faiss.lists import (
    ListBias,
    QueryMetric,
    lists_of,
    means_of,
    nearest_of,
    train_lists,
)

DIM, ROWS, HEADS, LISTS = 16, 3000, 2, 32


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class MadeUpRows:
    """Keys in all directions, and queries that see a few of them only, around one mean."""

    def __init__(self, num_queries: int = 200) -> None:
        random = np.random.default_rng(1)
        self.all_keys = random.standard_normal((HEADS, ROWS, DIM)).astype(np.float32)
        spread = np.where(np.arange(DIM) < 4, 1.0, 0.05)
        noise = random.standard_normal((HEADS, num_queries, 3, DIM)) * spread
        self.all_queries = (noise + 2 * (np.arange(DIM) == 0)).astype(np.float32)

    def keys(self, ids: np.ndarray) -> np.ndarray:
        return self.all_keys[:, ids]

    def queries(self) -> np.ndarray:
        return self.all_queries


def built(factory: str, rows: MadeUpRows) -> list:
    indexes = [new_index(factory, DIM) for _ in range(HEADS)]
    add_rows(indexes, rows, 0, np.arange(ROWS))
    return indexes


def test_distances_after_the_map_are_what_queries_notice() -> None:
    queries = unit(MadeUpRows().all_queries[0].reshape(-1, DIM))
    metric = QueryMetric(queries)
    first, second = unit(np.random.default_rng(2).standard_normal((2, 50, DIM)))
    mapped = np.square(metric.map(first) - metric.map(second)).sum(axis=1)
    noticed = np.square((first - second).astype(np.float64) @ queries.T).mean(axis=1)
    ridge = 0.01 / DIM * np.square((first - second).astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mapped, noticed + ridge, rtol=1e-4)
    np.testing.assert_allclose(metric.back(metric.map(first)), first, atol=1e-5)


def test_without_queries_distances_are_plain() -> None:
    metric = QueryMetric(np.empty((0, DIM), dtype=np.float32))
    keys = unit(np.random.default_rng(3).standard_normal((9, DIM)))
    distances = np.linalg.norm(metric.map(keys)[:, None] - metric.map(keys)[None], axis=-1)
    plain = np.linalg.norm(keys[:, None] - keys[None], axis=-1)
    np.testing.assert_allclose(distances, plain, rtol=1e-2)  # but for the ridge


def test_a_few_queries_say_nothing() -> None:
    few = QueryMetric(unit(MadeUpRows().all_queries[0, 0]))
    keys = unit(np.random.default_rng(3).standard_normal((9, DIM)))
    plain = QueryMetric(np.empty((0, DIM), dtype=np.float32))
    np.testing.assert_array_equal(few.map(keys), plain.map(keys))
    rows = MadeUpRows(num_queries=30)  # 15 of which would calibrate
    measured = calibrate(
        built(f"IVF{LISTS},Flat", rows), rows, np.arange(ROWS), np.zeros(ROWS, bool)
    )
    assert measured == [[], []]


def test_nearest_of_is_brute_force() -> None:
    random = np.random.default_rng(4)
    vectors, means = random.standard_normal((2500, DIM)), random.standard_normal((37, DIM))
    expected = np.linalg.norm(vectors[:, None] - means[None], axis=-1).argmin(axis=1)
    lists = nearest_of(vectors.astype(np.float32), means.astype(np.float32))
    np.testing.assert_array_equal(lists, expected)


def test_every_key_is_in_the_list_of_the_nearest_mean_and_in_one_only() -> None:
    rows = MadeUpRows()
    (index, _) = built(f"IVF{LISTS},SQfp16", rows)
    lists = lists_of(index)
    assert sorted(set(lists)) == list(range(LISTS))
    keys = unit(rows.all_keys[0])
    for number in (0, 7, LISTS - 1):
        np.testing.assert_allclose(
            means_of(index)[number], keys[lists == number].mean(axis=0), atol=1e-3
        )
    parameters = search_parameters(index, None, LISTS)
    _, positions = search(index, keys[:50], 1, parameters)
    np.testing.assert_array_equal(positions[:, 0], np.arange(50))


def test_moved_centroids_rank_lists_by_their_best_key() -> None:
    rows = MadeUpRows()
    metric = QueryMetric(unit(rows.all_queries[0].reshape(-1, DIM)))
    index = new_index(f"IVF{LISTS},Flat", DIM)
    keys = unit(rows.all_keys[0])
    train_lists(index, keys, metric)
    index.add(keys)
    lists, queries = lists_of(index), unit(rows.all_queries[0, ::2].reshape(-1, DIM))
    before = means_of(index)
    bias = ListBias(queries, LISTS)
    for first in range(0, ROWS, 1000):
        bias.look_at(keys[first : first + 1000], lists[first : first + 1000])
    bias.apply(index)
    moved = index.quantizer.reconstruct_n(0, LISTS)
    np.testing.assert_allclose(means_of(index), before, atol=1e-6)  # the keys stay where they are
    best = np.stack([(queries @ keys[lists == n].T).max(axis=1) for n in range(LISTS)], axis=1)
    error_before = np.abs(queries @ before.T - best).mean()
    assert np.abs(queries @ moved.T - best).mean() < 0.5 * error_before


@pytest.mark.parametrize("factory", [f"IVF{LISTS},Flat", f"IVF{LISTS},SQfp16", f"IVF{LISTS},SQ8"])
def test_calibration_says_what_a_search_finds(factory: str) -> None:
    rows = MadeUpRows()
    indexes = built(factory, rows)
    ids = np.arange(ROWS)
    is_sink = ids == 5
    measured = calibrate(indexes, rows, ids, is_sink)
    for head, (index, of_head) in enumerate(zip(indexes, measured, strict=True)):
        assert [e.nprobe for e in of_head][-1] == LISTS
        assert of_head[-1][1:] == pytest.approx((1, 1, 1))
        queries = unit(rows.all_queries[head, 1::2][::2].reshape(-1, DIM))
        exact = np.argsort(-(queries @ unit(rows.all_keys[head]).T), axis=1)[:, :10]
        for effort in of_head:
            faiss.cvar.indexIVF_stats.reset()
            _, positions = search(index, queries, 10, search_parameters(index, None, effort.nprobe))
            scanned = faiss.cvar.indexIVF_stats.ndis / len(queries) / ROWS
            recall = np.mean([np.isin(e, p).mean() for e, p in zip(exact, positions, strict=True)])
            assert effort.scanned == pytest.approx(scanned, abs=1e-6)
            if not factory.endswith("SQ8"):  # whose codes lose some of what their lists have
                assert effort.recall == pytest.approx(recall, abs=0.003)


def test_attention_weighs_rows_and_leaves_sinks_out() -> None:
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(2), 2, 2, faiss.METRIC_INNER_PRODUCT)
    index.quantizer.add(np.eye(2, dtype=np.float32))
    lists = np.array([0, 1, 1])
    queries = np.array([[1, 0.5]], dtype=np.float32)  # list 0 comes first
    nearest = np.array([[0, 1, -1]])
    attention = np.array([[0.25, 0.75, 0]], dtype=np.float32)
    single, both = efforts(index, lists, queries, nearest, attention)
    assert single == (1, 0.25, 0.5, pytest.approx(1 / 3))
    assert both == (2, 1, 1, 1)
    assert least_effort([single, both], 0.2) == single
    assert least_effort([single, both], 0.3) == both
    (all_sinks, _) = efforts(index, lists, queries, nearest, 0 * attention)
    assert all_sinks.attention == 1  # nothing to lose


def test_nearest_looks_at_parts() -> None:
    rows = MadeUpRows()
    keys, queries = unit(rows.all_keys[0]), unit(rows.all_queries[0, :20].reshape(-1, DIM))
    nearest = Nearest(queries, 10)
    for first, stop in ((0, 4), (4, 1000), (1000, ROWS)):
        nearest.look_at(keys[first:stop], first)
    expected = np.argsort(-(queries.astype(np.float64) @ keys.T.astype(np.float64)), axis=1)
    np.testing.assert_array_equal(np.sort(nearest.positions), np.sort(expected[:, :10]))
    few = Nearest(queries, 10)
    few.look_at(keys[:3], 0)
    assert (few.positions[:, 3:] == -1).all()
    assert (np.sort(few.positions[:, :3]) == [0, 1, 2]).all()


def test_the_metric_of_the_queries_scans_less_for_the_same_recall() -> None:
    rows = MadeUpRows()
    plain = MadeUpRows()
    plain.all_queries = rows.all_queries[:, :0]
    scanned = []
    for made_for in (rows, plain):
        indexes = built(f"IVF{LISTS},SQ8", made_for)
        measured = calibrate(indexes, rows, np.arange(ROWS), np.zeros(ROWS, dtype=bool))
        scanned.append(np.mean([next(e for e in f if e.recall >= 0.9).scanned for f in measured]))
    assert scanned[0] < 0.7 * scanned[1]
