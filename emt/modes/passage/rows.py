"""Rows of passages, read from the store and turned to the places where prompts put them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from emt.errors import ConfigError, MemoryUseError
from emt.model.attached import AttachedModel
from emt.model.devices import input_device, no_autocast
from emt.model.references import alive
from emt.modes.passage.locate import Placement
from memory_backends import MemoryBackend


@dataclass
class PlacedRows:
    """Keys and values of every layer, at their places in each prompt.

    Attributes:
        ids: (n, R) int64 row ids of n prompts, in order; -1 after a prompt's last row.
        at: (n,) int64, the token they are put before.
        lengths: (n,) int64, rows of each prompt.
        keys: layer -> (n, Hkv, R, D), turned to positions at, at + 1, ...
        values: layer -> (n, Hkv, R, Dv).
        are_full: whether all prompts have R rows.
        last_at: the largest of `at`.
    """

    ids: Tensor
    at: Tensor
    lengths: Tensor
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    are_full: bool
    last_at: int
    _repeated: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _key_lengths: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def read(
        cls,
        model: AttachedModel,
        backend: MemoryBackend,
        placements: Sequence[Placement],
    ) -> Self:
        """Read the rows of every layer, once, and turn their keys.

        Raises:
            ConfigError: they would stand beyond the model's positions.
            MemoryUseError: the model is gone.
        """
        with no_autocast(input_device(alive(model.decoder, "recall"))):
            return cls._read(model, backend, placements)

    @classmethod
    def _read(
        cls, model: AttachedModel, backend: MemoryBackend, placements: Sequence[Placement]
    ) -> Self:
        at = torch.tensor([placement.at for placement in placements])
        lengths = torch.tensor([len(placement.ids) for placement in placements])
        ids = torch.full((len(placements), int(lengths.max())), -1)
        for prompt, placement in enumerate(placements):
            ids[prompt, : len(placement.ids)] = torch.tensor(placement.ids, dtype=torch.long)
        check_end(int((at + lengths).max()), model.angles.longest)
        # Beyond a prompt's last row, any position will do that the model has.
        positions = at[:, None] + torch.arange(ids.shape[1])
        positions = positions.minimum((at + lengths - 1).clamp(min=0)[:, None])
        embeddings = model.angles.at(positions)
        keys, values = {}, {}
        of_layers = backend.fetch_layers(ids)
        for layer_idx in list(of_layers):
            key, value = of_layers.pop(layer_idx)  # so that no layer is kept twice
            key, value = key.transpose(0, 1), value.transpose(0, 1)  # (n, Hkv, R, D)
            unrotation = model.unrotations[layer_idx]
            if unrotation is not None:
                key = unrotation.redo(key, embeddings[layer_idx])
            keys[layer_idx], values[layer_idx] = key.contiguous(), value.contiguous()
        are_full = bool((lengths == ids.shape[1]).all())
        return cls(ids, at, lengths, keys, values, are_full, int(at.max()))

    def of_layer(self, layer_idx: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer for a batch, on the device and in the dtype of `like`.

        Args:
            layer_idx: the layer.
            like: (B, Hkv, S, D), where each prompt has B / n consecutive sequences: its beams.

        Returns:
            (B, Hkv, R, D) and (B, Hkv, R, Dv).
        """
        repeated = self._repeated.get((layer_idx, len(like)))
        if repeated is None or (repeated[0].device, repeated[0].dtype) != (like.device, like.dtype):
            times = sequences_per_prompt(len(like), len(self.ids))
            key, value = (
                part[layer_idx].to(like.device, like.dtype) for part in (self.keys, self.values)
            )
            if len(key) == 1:
                key, value = key.expand(times, -1, -1, -1), value.expand(times, -1, -1, -1)
            else:
                key, value = key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)
            repeated = self._repeated[layer_idx, len(like)] = key, value
        return repeated

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
        return part.repeat_interleave(sequences_per_prompt(batch, len(part)), 0)


def sequences_per_prompt(batch: int, prompts: int) -> int:
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
