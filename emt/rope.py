"""Rotary position embeddings: a layer's keys back to position 0, and from there to any other.

Reading memories needs no knowledge of RoPE, only writing does. The cosines and sines are those the
model itself hands to a layer, and the rotation is the model's own `apply_rotary_pos_emb` with the
sine negated, so every variant (partial, interleaved, two bases, NTK, YaRN) is undone by the code
that did it. Whether and how a layer rotates its keys is not read from the config but seen:
`find_unrotation` compares the keys of one token at two positions, where everything but the rotation
is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PositionEmbeddings = tuple[Tensor, Tensor]  # cos and sin, each (B, Q, rotary dims or half of them)


@dataclass(frozen=True)
class Unrotation:
    """How to bring one layer's keys back to position 0, and to other positions again.

    Attributes:
        rotate: the model's `apply_rotary_pos_emb(query, key, cos, sin)`.
        num_rotated: how many of the head's dims, from the first, it is given.
    """

    rotate: Callable[..., Any]
    num_rotated: int

    def __call__(self, key: Tensor, embeddings: PositionEmbeddings) -> Tensor:
        """Return keys as the model would have computed them at position 0.

        Args:
            key: (B, Hkv, Q, D), rotated by the model.
            embeddings: the cos and sin that the model rotated them with.

        Returns:
            (B, Hkv, Q, D) in the key's dtype, computed in float32.

        YaRN and its relatives scale cos and sin by a factor a. Turning back with (a cos, -a sin)
        leaves a^2 = cos^2 + sin^2 on the key, where position 0 has a; so divide by a. The same
        holds for turning forth again.
        """
        return self._turned(key, embeddings, -1)

    def redo(self, key: Tensor, embeddings: PositionEmbeddings) -> Tensor:
        """Return keys as the model would have computed them at other positions.

        Args:
            key: (B, Hkv, Q, D), at position 0.
            embeddings: the cos and sin that the model has for these positions.

        Returns:
            (B, Hkv, Q, D) in the key's dtype, computed in float32.
        """
        return self._turned(key, embeddings, 1)

    def _turned(self, key: Tensor, embeddings: PositionEmbeddings, direction: int) -> Tensor:
        cos, sin = (part.to(key.device, torch.float32) for part in embeddings)
        turned, rest = key[..., : self.num_rotated].float(), key[..., self.num_rotated :]
        # The first argument stands in for queries, and one head of them is enough.
        found = self.rotate(turned[:, :1], turned, cos, direction * sin)[1]
        found = (found / (cos.square() + sin.square()).mean().sqrt()).to(key.dtype)
        return torch.cat([found, rest], dim=-1) if rest.shape[-1] else found


def own_rotation(module: nn.Module) -> Callable[..., Any] | None:
    """Return the `apply_rotary_pos_emb` of the file that defines a module, if it has one."""
    found = vars(sys.modules[type(module).__module__]).get("apply_rotary_pos_emb")
    return found if callable(found) else None


def is_at_zero(key: Tensor, key_at_zero: Tensor, moved: Tensor, tolerance: float) -> bool:
    """Tell whether a key, found from the rotated key `moved`, is the one at position 0.

    Each element is compared on its own scale, for some keys have elements a thousand times larger
    than others. Rounding in a rotation is a few units in the last place of an element as it was
    before or after, so it cannot fail this test.
    """
    key, key_at_zero, moved = key.float(), key_at_zero.float(), moved.float()
    bound = tolerance * (key_at_zero.abs() + moved.abs())
    return bool(((key - key_at_zero).abs() <= bound).all())


def find_unrotation(
    module: nn.Module,
    key: Tensor,
    key_at_zero: Tensor,
    embeddings: Any,
    tolerance: float,
    rotate: Callable[..., Any] | None = None,
) -> Unrotation | None:
    """Find out how to bring an attention module's keys back to position 0.

    Args:
        module: the attention module.
        key: (1, Hkv, 1, D), the key of one token alone at some position.
        key_at_zero: the key of the same token alone at position 0.
        embeddings: what the module was given as `position_embeddings` for `key`, or None.
        tolerance: largest relative difference that still counts as equal.
        rotate: `rotate(query, key, cos, sin)`; the module's own `apply_rotary_pos_emb` if None.

    Returns:
        An `Unrotation` that was seen to work both ways, or None where nothing works.
    """
    rotate = own_rotation(module) if rotate is None else rotate
    is_pair = isinstance(embeddings, tuple) and len(embeddings) == 2
    if rotate is None or not is_pair:
        return None
    # Some files split the rotated dims off before rotating, some while rotating, some rotate all;
    # some have a cosine for each dim, some for each pair of dims.
    angles, dim = embeddings[0].shape[-1], key.shape[-1]
    for num_rotated in dict.fromkeys((angles, dim, min(2 * angles, dim))):
        candidate = Unrotation(rotate, num_rotated)
        try:
            back = candidate(key, embeddings)
            again = candidate.redo(key_at_zero, embeddings)
        except (RuntimeError, ValueError, TypeError, IndexError):  # not this variant's shapes
            continue
        if is_at_zero(back, key_at_zero, key, tolerance) and is_at_zero(
            again, key, key_at_zero, tolerance
        ):
            return candidate
    return None
