"""Rotary position embeddings: bring a layer's keys to position 0, and from there to any other.

Keys are stored at position 0, so that a query can find them wherever they stood. The rotation is
the model's own `apply_rotary_pos_emb` with the sine negated: every variant (partial, interleaved,
two bases, NTK, YaRN) is undone by the code that did it. Where a family has no such function, or
calls it in another way, `rotate_halves` or `rotate_pairs` takes its place.

How a layer rotates its keys is not read from the config but observed, by `find_unrotation`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PositionEmbeddings = tuple[Tensor, Tensor]  # cos and sin, each (B, Q, rotary dims or half of them)


def as_cos_sin(embeddings: Any) -> PositionEmbeddings:
    """Return the position embeddings of a layer as cosines and sines.

    DeepSeek-V2 and Llama 4 have complex numbers, (B, Q, rotary dims / 2).

    Raises:
        TypeError: `embeddings` is neither.
    """
    if isinstance(embeddings, Tensor) and embeddings.is_complex():
        return embeddings.real, embeddings.imag
    if isinstance(embeddings, tuple | list) and len(embeddings) == 2:
        cos, sin = embeddings
        if isinstance(cos, Tensor) and isinstance(sin, Tensor):
            return cos, sin
    raise TypeError(f"expected cos and sin, or complex numbers; got {type(embeddings).__name__}")


def rotate_halves(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate dim i of a key's first half with dim i of its second half; leave the query.

    The key is (B, Hkv, Q, R), cos and sin (B, Q, R or R/2).

    Source:
        Su et al., RoFormer (arXiv 2104.09864), with the dims in the order of GPT-NeoX.
    """
    half = key.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    first, second = key[..., :half], key[..., half:]
    return query, torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_pairs(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate dim 2i of a key with dim 2i + 1; arguments as for `rotate_halves`.

    Source:
        Su et al., RoFormer (arXiv 2104.09864), equation 34.
    """
    half = key.shape[-1] // 2
    step = 2 if cos.shape[-1] == key.shape[-1] else 1  # each pair's angle twice, side by side
    cos, sin = cos[..., ::step][..., :half].unsqueeze(1), sin[..., ::step][..., :half].unsqueeze(1)
    even, odd = key[..., 0::2], key[..., 1::2]
    return query, torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Unrotation:
    """How to bring one layer's keys back to position 0, and to other positions again.

    Attributes:
        rotate: `rotate(query, key, cos, sin)`: the model's own, `rotate_halves` or `rotate_pairs`.
        num_rotated: how many of the head's dims are rotated.
        is_last: whether these are the head's last dims (latent attention), not its first.
        gain: (D,), a factor of keys that the model applies after the rotation (HunYuan's norm).
    """

    rotate: Callable[..., Any]
    num_rotated: int
    is_last: bool = False
    gain: Tensor | None = None

    def __call__(self, key: Tensor, embeddings: PositionEmbeddings) -> Tensor:
        """Return keys (B, Hkv, Q, D) as the model would have computed them at position 0.

        `embeddings` are the cos and sin that the model rotated them with. The result is computed in
        float32 and has the key's dtype.
        """
        return self._turned(key, embeddings, -1)

    def redo(self, key: Tensor, embeddings: PositionEmbeddings) -> Tensor:
        """Return keys (B, Hkv, Q, D) at position 0 as they would be at those of `embeddings`."""
        return self._turned(key, embeddings, 1)

    def _turned(self, key: Tensor, embeddings: PositionEmbeddings, direction: int) -> Tensor:
        """Rotate keys forward (1) or back (-1).

        YaRN and its relatives scale cos and sin by a factor a. Rotating back with (a cos, -a sin)
        leaves a^2 = cos^2 + sin^2 on the key, where position 0 has a; so divide by a. The same
        holds for rotating forward.
        """
        cos, sin = (part.to(key.device, torch.float32) for part in embeddings)
        gain = None if self.gain is None else self.gain.detach().to(key.device, torch.float32)
        whole = key if gain is None else key.float() / gain
        start = whole.shape[-1] - self.num_rotated if self.is_last else 0
        stop = start + self.num_rotated
        turned = whole[..., start:stop].float()
        # The first argument stands in for queries, and one head of them is enough.
        turned = self.rotate(turned[:, :1], turned, cos, direction * sin)[1]
        turned = (turned / (cos.square() + sin.square()).mean().sqrt()).to(whole.dtype)
        if self.num_rotated < whole.shape[-1]:
            turned = torch.cat([whole[..., :start], turned, whole[..., stop:]], dim=-1)
        return turned if gain is None else (turned * gain).to(key.dtype)


def own_rotation(module: nn.Module) -> Callable[..., Any] | None:
    """Return the `apply_rotary_pos_emb` of the file that defines a module, or None."""
    rotation = vars(sys.modules[type(module).__module__]).get("apply_rotary_pos_emb")
    return rotation if callable(rotation) else None


def is_at_zero(key: Tensor, key_at_zero: Tensor, moved: Tensor, tolerance: float) -> bool:
    """Tell whether a key, computed from the rotated key `moved`, equals the one at position 0.

    Each element is compared on its own scale, for some keys have elements a thousand times larger
    than others. A rotation rounds an element by a few units in the last place of its value before
    or after, so rounding cannot fail this test.
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
    """Find the way to bring an attention module's keys back to position 0; None if there is none.

    Args:
        module: the attention module.
        key: (1, Hkv, 1, D), of one token alone at some position.
        key_at_zero: (1, Hkv, 1, D), of the same token alone at position 0.
        embeddings: the `position_embeddings` that the module was given for `key`, or None.
        tolerance: largest relative difference that still counts as equal.
        rotate: `rotate(query, key, cos, sin)`; the module's own `apply_rotary_pos_emb` if None.
    """
    try:
        cos_sin = as_cos_sin(embeddings)
    except TypeError:
        return None
    for candidate in _candidates(module, rotate, key.shape[-1], cos_sin[0].shape[-1]):
        try:
            back = candidate(key, cos_sin)
            again = candidate.redo(key_at_zero, cos_sin)
        except (RuntimeError, ValueError, TypeError, IndexError):  # not this variant's shapes
            continue
        if is_at_zero(back, key_at_zero, key, tolerance) and is_at_zero(
            again, key, key_at_zero, tolerance
        ):
            return candidate
    return None


def _candidates(
    module: nn.Module, own: Callable[..., Any] | None, head_dim: int, num_angles: int
) -> Iterator[Unrotation]:
    """Yield all ways in which a layer may rotate its keys, the model's own first."""
    own = own_rotation(module) if own is None else own
    rotations = [*([] if own is None else [own]), rotate_halves, rotate_pairs]
    # Some files split the rotated dims off before rotating, some while rotating, some rotate all.
    sizes = [
        size for size in dict.fromkeys((num_angles, head_dim, 2 * num_angles)) if size <= head_dim
    ]
    for gain in (None, *_gains(module, head_dim)):
        for rotate in rotations:
            for size in sizes:
                for is_last in (False, True) if size < head_dim else (False,):
                    yield Unrotation(rotate, size, is_last, gain)


def _gains(module: nn.Module, head_dim: int) -> Iterator[Tensor]:
    """Yield weights (D,) of the norms that a layer may apply to keys after rotating them."""
    for child in vars(module).get("_modules", {}).values():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (head_dim,):
            yield weight
