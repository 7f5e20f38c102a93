"""How many of the ten nearest keys `index="auto"` finds, for real queries on real keys of SmolLM2.

    python scripts/bench_recall.py [--rows 16384]

Keys: the first tokens of the benchmark's book. Queries: a later passage of it, after RoPE, all
query heads of some layers. Truth: brute force. Writes `benchmarks/recall.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faiss
import numpy as np
import torch
from bench_decode import CONFIG, machine, token_ids

import emt
from emt.cli import quiet
from emt.hook import watching
from emt.loading import load
from memory_backends.vector_db.index import factory_for, new_index, search, search_parameters

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (1, 3, 6, 10, 14, 17, 18, 22, 26, 29)
QUERY_TOKENS = 64
SINKS = 4


@torch.no_grad()
def keys_and_queries(num_rows: int) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Return normalised keys (Hkv, M, D) and queries (Hkv, N, D) of each layer."""
    with quiet():
        model = load().model
    ids = token_ids(num_rows + 1024)
    memory = emt.attach(model, CONFIG)
    memory.write(ids[:num_rows], document="book")
    with watching(model) as seen:
        model(ids[None, num_rows : num_rows + 512], use_cache=False)
    keys, queries = {}, {}
    for call in seen.calls:
        dim, heads = call.query.shape[-1], call.key.shape[1]
        rows = memory.backend._stored(call.layer_idx)[..., :dim].float().transpose(0, 1)
        keys[call.layer_idx] = torch.nn.functional.normalize(rows, dim=-1).numpy()
        some = call.query[0, :, -QUERY_TOKENS:].float().reshape(heads, -1, dim)
        queries[call.layer_idx] = torch.nn.functional.normalize(some, dim=-1).numpy()
    return keys, queries


def recall(keys: np.ndarray, queries: np.ndarray) -> float:
    """Return the share of the ten nearest keys that the index of `auto` finds."""
    exact = np.argsort(-(queries @ keys.T), axis=1)[:, :10]
    index = new_index(factory_for("auto", len(keys), keys.shape[1]), keys.shape[1])
    index.train(keys)
    index.add(keys)
    _, found = search(index, queries, 10, search_parameters(index, None))
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]))


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16384)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    keys, queries = keys_and_queries(options.rows)
    window = CONFIG.max_length
    content = np.flatnonzero(np.arange(options.rows) % window >= SINKS)
    lines = [
        '# What `index="auto"` finds',
        "",
        f"`python scripts/bench_recall.py` on {machine()}: recall@10 against brute force, "
        f"{options.rows:,} rows of SmolLM2, mean over KV heads, "
        f"`{factory_for('auto', options.rows, 64)}`, one list of 8 scanned.",
        "",
        "| layer | all rows | attention sinks left out |",
        "|---|---|---|",
    ]
    means = []
    for layer in LAYERS:
        pair = [
            float(
                np.mean(
                    [recall(k[rows], q) for k, q in zip(keys[layer], queries[layer], strict=True)]
                )
            )
            for rows in (np.arange(options.rows), content)
        ]
        means.append(pair)
        lines.append(f"| {layer} | {pair[0]:.3f} | {pair[1]:.3f} |")
        print(lines[-1], flush=True)
    both = np.mean(means, axis=0)
    lines.append(f"| mean | {both[0]:.3f} | {both[1]:.3f} |")
    (ROOT / "benchmarks" / "recall.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-1])


if __name__ == "__main__":
    main()
