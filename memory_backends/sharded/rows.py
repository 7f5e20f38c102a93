"""The rows and query samples of a memory with shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import numpy as np

from memory_backends.errors import StoreError
from memory_backends.layout import Heads, Int64Array, MemoryLayout, Rows
from memory_backends.rows.base import Flushed
from memory_backends.sharded.placements import Placements
from memory_backends.sharded.shard import Shard
from memory_backends.sharded.shards import Shards


class ShardedRows:
    """Rows by the memory's ids, read from shards: a `RowStorage` that is written to elsewhere.

    Attributes:
        num_rows: how many rows are committed.
        placements: where they are.
        shards: what they are in.
    """

    def __init__(
        self, layout: MemoryLayout, placements: Placements, shards: Shards, num_rows: int
    ) -> None:
        self._layout = layout
        self.placements = placements
        self.shards = shards
        self.num_rows = num_rows
        placements.show(num_rows)

    def show(self, num_rows: int, *, anew: bool = False) -> None:
        """Show the first `num_rows` rows; with `anew`, of the shards as they are now."""
        self.num_rows = num_rows
        self.placements.show(num_rows)
        if anew:
            self.shards.refresh()

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return committed rows by id: (h, ...) int64 to (h, ..., D + Dv); any for -1."""
        layer, flat = self._layout.layers[layer_idx], ids.cpu().flatten(1)
        rows = torch.zeros(*flat.shape, layer.row_dim, dtype=self._layout.dtype)
        shards, places = self.placements.locate(flat.numpy())

        def question(number: int) -> Callable[[Shard], torch.Tensor]:
            # Each head has as many ids, of which those that are in other shards are -1.
            is_here = (shards == number).any(axis=0)
            own = np.where(shards == number, places, -1)[:, is_here]
            return lambda shard: shard.gather(layer_idx, torch.from_numpy(own), heads)

        numbers = self._numbers_of(shards)
        for number, part in self.shards.ask({n: question(n) for n in numbers}).items():
            is_here = torch.from_numpy(shards == number)
            columns = is_here.any(dim=0)
            rows[is_here] = part[is_here[:, columns]]
        return rows.view(*ids.shape, layer.row_dim)

    def take(self, layer_idx: int, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (Hkv, ...) to (Hkv, ..., D + Dv)."""
        return self.gather(layer_idx, places // self._layout.layers[layer_idx].num_key_value_heads)

    def span(self, layer_idx: int, first: int, stop: int, heads: Heads = None) -> torch.Tensor:
        """Return consecutive committed rows, (stop - first, h, D + Dv), of `heads` or all Hkv."""
        num_heads = self._layout.layers[layer_idx].num_key_value_heads
        ids = torch.arange(first, stop).expand(num_heads if heads is None else len(heads), -1)
        return self.gather(layer_idx, ids, heads).transpose(0, 1)

    def gather_layers(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return rows of all layers and heads: (...) int64 to layer -> (Hkv, ..., D + Dv)."""
        flat = ids.cpu().flatten().numpy()
        shards, places = self.placements.locate(flat)
        whole = {
            idx: torch.zeros(
                len(flat), layer.num_key_value_heads, layer.row_dim, dtype=self._layout.dtype
            )
            for idx, layer in self._layout.layers.items()
        }
        answers = self.shards.ask(
            {
                number: partial(_rows, ids=torch.from_numpy(places[shards == number]))
                for number in self._numbers_of(shards)
            }
        )
        for number, layers in answers.items():
            is_here = torch.from_numpy(shards == number)
            for idx, rows in layers.items():
                whole[idx][is_here] = rows
        return {
            idx: rows.transpose(0, 1).reshape(rows.shape[1], *ids.shape, rows.shape[2])
            for idx, rows in whole.items()
        }

    def close(self) -> None:
        """Let go of the shards."""
        self.shards.close()
        self.placements.close()

    def _numbers_of(self, shards: Int64Array) -> list[int]:
        return [int(number) for number in np.unique(shards) if number >= 0]

    # -- writing, which batches of the shards do --------------------------------------------------

    def append(self, rows: Rows) -> None:
        """Refuse: a document is appended to its shard."""
        raise StoreError("rows of a sharded store are written to its shards.")

    def seal(self) -> None:
        """Do nothing."""

    def rewind(self) -> None:
        """Do nothing."""

    def flush(self) -> Flushed:
        """Do nothing."""
        return Flushed([], {}, {})


def _rows(shard: Shard, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    return shard.rows(ids)


class ShardedSamples:
    """The query samples of all shards together."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.num_heads: Mapping[int, int] = {}

    def grouped(self, layer_idx: int) -> torch.Tensor:
        """Return the samples of a layer by KV head; see `MemoryBackend.sampled_queries`."""
        samples: Sequence[torch.Tensor] = [shard.samples(layer_idx) for shard in self._shards]
        some = [each for each in samples if each.shape[1]]
        return torch.cat(some, dim=1) if some else samples[0]

    def close(self) -> None:
        """Do nothing: the shards have them."""
