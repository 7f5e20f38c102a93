"""Passages: runs of stored rows, read from the store and turned to where a prompt puts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import numpy as np
from torch import Tensor

from emt.errors import ConfigError, DocumentError, MemoryUseError
from emt.ingest.rows import SINK_ROWS
from emt.model.positions import Angles
from emt.model.rope import Unrotation
from emt.passage import Passage, are_among
from memory_backends import MemoryBackend
from memory_backends.layout import Int64Array, StoredDocument


@dataclass(frozen=True)
class Place:
    """What is recalled into one prompt, and where.

    Attributes:
        ids: ids of rows, in the order they are put.
        at: the token of the prompt that they are put before.
    """

    ids: tuple[int, ...]
    at: int


def by_prompt(
    passages: Sequence[Passage] | Sequence[Sequence[Passage]], at: int | Sequence[int]
) -> tuple[list[Sequence[Passage]], list[int]]:
    """Return passages and places, one of each for each prompt of a batch.

    Args:
        passages: of all prompts alike, or one sequence for each prompt.
        at: of all prompts alike, or one for each.

    Raises:
        ConfigError: their numbers differ, or they are something else.
    """
    alike: list[Passage] = []
    each: list[Sequence[Passage]] = []
    for given in passages:
        if isinstance(given, Passage):
            alike.append(given)
        elif isinstance(given, Sequence) and all(isinstance(one, Passage) for one in given):
            each.append(given)
        else:
            raise ConfigError(
                f"expected Passage, or sequences of it, one for each prompt; got {given!r:.100}."
            )
    if alike and each:
        raise ConfigError(
            "passages must be alike for all prompts, or one sequence for each; got both."
        )
    places = [at] if isinstance(at, int) else list(at)
    rows: list[Sequence[Passage]] = each or [alike]
    if len(rows) == 1 and len(places) > 1:
        rows = rows * len(places)
    if len(places) == 1:
        places = places * len(rows)
    if len(places) != len(rows):
        raise ConfigError(
            f"at must be one place, or one for each prompt: {len(rows)} of them; got {len(places)}."
        )
    return rows, places


def places(
    backend: MemoryBackend,
    passages: Sequence[Sequence[Passage]],
    at: Sequence[int],
    sinks: bool | None,
) -> list[Place]:
    """Find the rows of passages, one sequence of them for each prompt of a batch.

    Args:
        backend: where the rows are.
        passages: of each prompt, in the order they are put.
        at: of each prompt, the token its passages are put before, padding not counted.
        sinks: whether the first passage is put after the attention sinks of its document, if it
            does not begin with them; None where it is put before a prompt's first token, without
            those that another passage has.

    Raises:
        ConfigError: passages of one prompt share rows, or a place is negative.
        DocumentError: a document is unknown, or does not have a passage's rows, or some of them
            were removed.
    """
    documents: dict[str, StoredDocument] = {}
    there = backend.catalog.searchable_rows("all")
    found = []
    for chosen, start in zip(passages, at, strict=True):
        if start < 0:
            raise ConfigError(f"at must be 0 or more, a token of the prompt; got {start}.")
        ids: list[int] = []
        for order, passage in enumerate(chosen):
            if passage.document not in documents:
                documents[passage.document] = backend.catalog.document(passage.document)
            document = documents[passage.document]
            _check_range(passage, document)
            first = document.first_row
            if order == 0 and (start == 0 if sinks is None else sinks):
                kept = document.sink_rows[:SINK_ROWS]
                kept = kept[kept < passage.first]
                if sinks is None:  # a later passage may have them
                    kept = np.array([row for row in kept if not _has(chosen[1:], passage, row)])
                sink_ids = first + kept.astype(np.int64)
                ids += sink_ids[are_among(sink_ids, there)].tolist()
            ids += range(first + passage.first, first + passage.stop)
        if len(set(ids)) < len(ids):
            raise ConfigError(
                f"passages of one prompt must not share rows; got {', '.join(map(str, chosen))}. "
                "Join those that touch, or pass sinks=False if a later one has the sinks."
            )
        found.append(Place(tuple(ids), start))
    _check_there(there, found)
    return found


def _has(passages: Sequence[Passage], like: Passage, row: int) -> bool:
    """Tell whether one of some passages has a row of the document of another."""
    return any(one.document == like.document and one.first <= row < one.stop for one in passages)


def _check_range(passage: Passage, document: StoredDocument) -> None:
    if not 0 <= passage.first < passage.stop <= len(document.row_tokens):
        raise DocumentError(
            f"expected 0 <= first < stop <= {len(document.row_tokens)}, the rows of document "
            f"'{passage.document}'; got first={passage.first}, stop={passage.stop}."
        )


def _check_there(there: Int64Array, found: list[Place]) -> None:
    wanted = np.array(sorted({idx for place in found for idx in place.ids}), dtype=np.int64)
    gone = wanted[~are_among(wanted, there)]
    if len(gone):
        raise DocumentError(
            f"{len(gone)} rows of these passages were removed, the first of them row "
            f"{gone[0]} of the memory. Recall passages without them."
        )


@dataclass
class RecalledRows:
    """Keys and values of every layer, at their places in each prompt.

    Attributes:
        ids: (n, R) int64 row ids of n prompts, in order; -1 after a prompt's last row.
        at: (n,) int64, the token they are put before.
        lengths: (n,) int64, rows of each prompt.
        keys: layer -> (n, Hkv, R, D), turned to positions at, at + 1, ...
        values: layer -> (n, Hkv, R, Dv).
        fills: whether all prompts have R rows.
        last_at: the largest of `at`.
    """

    ids: Tensor
    at: Tensor
    lengths: Tensor
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    fills: bool
    last_at: int
    _repeated: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _key_lengths: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def read(
        cls,
        backend: MemoryBackend,
        found: Sequence[Place],
        unrotations: Mapping[int, Unrotation | None],
        angles: Angles,
    ) -> RecalledRows:
        """Read the rows of every layer, once, and turn their keys.

        Raises:
            ConfigError: they would stand beyond the model's positions.
        """
        at = torch.tensor([place.at for place in found])
        lengths = torch.tensor([len(place.ids) for place in found])
        ids = torch.full((len(found), int(lengths.max())), -1)
        for row, place in enumerate(found):
            ids[row, : len(place.ids)] = torch.tensor(place.ids, dtype=torch.long)
        check_end(int((at + lengths).max()), angles.longest)
        # Beyond a prompt's last row, any position will do that the model has.
        positions = at[:, None] + torch.arange(ids.shape[1])
        positions = positions.minimum((at + lengths - 1).clamp(min=0)[:, None])
        embeddings = angles.at(positions)
        keys, values = {}, {}
        for layer_idx, layer in backend.layout.layers.items():
            key, value = backend.fetch(layer_idx, ids.expand(layer.num_key_value_heads, -1, -1))
            key, value = key.transpose(0, 1), value.transpose(0, 1)  # (n, Hkv, R, D)
            unrotation = unrotations[layer_idx]
            if unrotation is not None:
                key = unrotation.redo(key, embeddings[layer_idx])
            keys[layer_idx], values[layer_idx] = key.contiguous(), value.contiguous()
        fills = bool((lengths == ids.shape[1]).all())
        return cls(ids, at, lengths, keys, values, fills, int(at.max()))

    def of_layer(self, layer_idx: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer for a batch, on the device and in the dtype of `like`.

        Args:
            layer_idx: the layer.
            like: (B, Hkv, S, D), where each prompt has B / n consecutive sequences: its beams.

        Returns:
            (B, Hkv, R, D) and (B, Hkv, R, Dv).
        """
        found = self._repeated.get((layer_idx, len(like)))
        if found is None or found[0].device != like.device or found[0].dtype != like.dtype:
            times = repeats(len(like), len(self.ids))
            key, value = (
                part[layer_idx].to(like.device, like.dtype) for part in (self.keys, self.values)
            )
            if len(key) == 1:
                key, value = key.expand(times, -1, -1, -1), value.expand(times, -1, -1, -1)
            else:
                key, value = key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)
            found = self._repeated[layer_idx, len(like)] = key, value
        return found

    def key_lengths(self, layer_idx: int) -> Tensor:
        """Return the Euclidean length of each key of a layer, (n, Hkv, R) float32."""
        if layer_idx not in self._key_lengths:
            self._key_lengths[layer_idx] = self.keys[layer_idx].float().norm(dim=-1)
        return self._key_lengths[layer_idx]

    @staticmethod
    def of_batch(part: Tensor, batch: int) -> Tensor:
        """Return what n prompts have, (n, ...), for each sequence of a batch, (B, ...)."""
        if len(part) == 1:
            return part.expand(batch, *part.shape[1:])
        return part.repeat_interleave(repeats(batch, len(part)), 0)


def repeats(batch: int, prompts: int) -> int:
    """Return how many sequences of a batch each prompt has.

    Raises:
        MemoryUseError: there is no such number.
    """
    if batch % prompts:
        raise MemoryUseError(
            f"passages were given for {prompts} prompts; got a batch of {batch} sequences. Give "
            "passages for each prompt of the batch, or one list for all of them."
        )
    return batch // prompts


def check_end(end: int, longest: int | None) -> None:
    """Refuse positions that the model does not have, or rotates in another way.

    Raises:
        ConfigError: naming both numbers.
    """
    if longest is not None and end > longest:
        raise ConfigError(
            f"recalled rows, prompt and answer must end within the {longest} positions that the "
            f"model rotates alike; got {end}. Recall fewer rows, or give a shorter prompt."
        )
