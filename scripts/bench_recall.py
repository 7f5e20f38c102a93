"""How much of a memory `index="auto"` must scan to find the nearest rows of real queries.

    python scripts/bench_recall.py [--rows 32768]

Compares three ways to make the inverted lists of the same keys: plain k-means, k-means in the
metric of the queries, and the latter with lists ranked by their best key, which is what `auto` does
(`memory_backends/faiss/lists.py`). Writes `benchmarks/recall.md`.
"""

from __future__ import annotations

import argparse

import numpy as np
from bench_decode import ROOT, machine, token_ids

import emt
from emt.cli import quiet
from emt.model.loading import load
from memory_backends import MemoryBackend
from memory_backends.faiss.building import add_rows, calibrate
from memory_backends.faiss.calibration import Effort
from memory_backends.faiss.index import factory_for, new_index

LAYERS = [1, 3, 6, 10, 14, 17, 18, 22, 26, 29]
DOCUMENT = 512
RECALL = 0.95
WAYS = {  # SQ8 codes are of differences to the centroids, so its lists are not ranked anew
    "plain k-means": ("SQ8", False),
    "metric of the queries": ("SQ8", True),
    "and ranked by the best key": ("SQfp16", True),
}


class LayerRows:
    """One layer of a memory, with or without its sampled queries."""

    def __init__(self, backend: MemoryBackend, layer_idx: int, *, has_queries: bool = True) -> None:
        num_rows, dim = backend.catalog.num_rows, backend.layout.layers[layer_idx].head_dim
        span = backend._store.rows.span(layer_idx, 0, num_rows)[..., :dim]
        self._keys = span.float().transpose(0, 1).numpy()  # (Hkv, M, D)
        self._queries = backend.sampled_queries(layer_idx).numpy()
        if not has_queries:
            self._queries = self._queries[:, :0]

    def keys(self, ids: np.ndarray) -> np.ndarray:
        """Return the keys of rows, (Hkv, n, head_dim)."""
        return self._keys[:, ids]

    def queries(self) -> np.ndarray:
        """Return sampled queries, (Hkv, s, G, head_dim)."""
        return self._queries


def write(num_rows: int) -> MemoryBackend:
    """Encode the benchmark's book as documents of `DOCUMENT` tokens."""
    with quiet():
        model = load().model
    memory = emt.attach(
        model, emt.MemoryConfig.published(stride=DOCUMENT, max_length=DOCUMENT, sinks="one")
    )
    parts = token_ids(num_rows).split(DOCUMENT)
    memory.write_all((f"{at:04d}", part) for at, part in enumerate(parts))
    return memory.backend


def efforts(backend: MemoryBackend, layer_idx: int, way: str) -> list[Effort]:
    """Return what each head must do for `RECALL`, on queries that made nothing."""
    codes, has_metric = WAYS[way]
    ids = backend.catalog.searchable_rows("one")
    is_sink = np.isin(ids, backend.catalog.sink_rows())
    layer = backend.layout.layers[layer_idx]
    lists = factory_for("auto", len(ids), layer.head_dim).partition(",")[0]
    indexes = [
        new_index(f"{lists},{codes}", layer.head_dim) for _ in range(layer.num_key_value_heads)
    ]
    add_rows(indexes, LayerRows(backend, layer_idx, has_queries=has_metric), 0, ids)
    found = calibrate(indexes, LayerRows(backend, layer_idx), ids, is_sink)
    return [next(e for e in head if e.recall >= RECALL or e is head[-1]) for head in found]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32_768)
    options = parser.parse_args()
    backend = write(options.rows)
    lists = factory_for("auto", len(backend), backend.layout.largest_head_dim)
    lines = [
        '# What `index="auto"` must scan',
        "",
        f"`python scripts/bench_recall.py` on {machine()}: {options.rows:,} rows of SmolLM2 in "
        f"documents of {DOCUMENT} tokens, `{lists}`, one set of attention sinks. Share of the rows "
        f"that are scanned for a recall@10 of {RECALL} or more, and in brackets the share of the "
        "attention to the exact ten nearest rows that is found then; queries of other tokens than "
        "those that made the lists, mean over KV heads.",
        "",
        "| layer | " + " | ".join(WAYS) + " |",
        "|---|" + "---|" * len(WAYS),
    ]
    means: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for layer_idx in LAYERS:
        cells = []
        for way in WAYS:
            found = efforts(backend, layer_idx, way)
            pair = [
                float(np.mean([getattr(e, name) for e in found])) for name in ("scanned", "recall")
            ]
            means[way].append(pair)
            cells.append(f"{pair[0]:.1%} ({pair[1]:.3f})")
        lines.append(f"| {layer_idx} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    both = [np.mean(pairs, axis=0) for pairs in means.values()]
    lines.append("| mean | " + " | ".join(f"{s:.1%} ({r:.3f})" for s, r in both) + " |")
    print(lines[-1])
    (ROOT / "benchmarks" / "recall.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
