"""What a search refuses: layers, heads, queries, row ids and devices that do not fit."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import torch

from memory_backends.errors import MemoryMismatchError
from memory_backends.layout import Heads, LayerLayout, MemoryLayout


def checked_layer(layout: MemoryLayout, layer_idx: int) -> LayerLayout:
    """Return the shape of a layer's rows; raise a MemoryMismatchError if there is no such layer."""
    if layer_idx not in layout.layers:
        raise MemoryMismatchError(f"layer must be one of {sorted(layout.layers)}; got {layer_idx}.")
    return layout.layers[layer_idx]


def check_heads(layer: LayerLayout, layer_idx: int, heads: Iterable[int]) -> tuple[int, ...]:
    """Return KV heads of a layer; refuse none, one that is named twice, and other heads."""
    chosen = tuple(heads)
    num_heads = layer.num_key_value_heads
    are_numbers = all(isinstance(head, Integral) and head in range(num_heads) for head in chosen)
    if not chosen or not are_numbers or len(set(chosen)) < len(chosen):
        raise MemoryMismatchError(
            f"heads must be one or more of the KV heads 0 to {num_heads - 1} of layer {layer_idx}, "
            f"each once; got {list(chosen)}. Number KV heads, not query heads, and stack the "
            "queries of one head along N."
        )
    return tuple(int(head) for head in chosen)


def check_search(layer: LayerLayout, queries: torch.Tensor, k: int, heads: Heads = None) -> None:
    """Refuse queries that are not (Hkv, N, head_dim), or (len(heads), N, head_dim), and k < 1."""
    if heads is None:
        first, num_heads = "num_key_value_heads", layer.num_key_value_heads
    else:
        first, num_heads = "len(heads)", len(heads)
    if queries.ndim != 3 or queries.shape[::2] != (num_heads, layer.head_dim):
        raise MemoryMismatchError(
            f"queries must have shape ({first}={num_heads}, N, head_dim={layer.head_dim}); "
            f"got {tuple(queries.shape)}. "
            "Stack the query heads of a group along N."
        )
    if k < 1:
        raise MemoryMismatchError(f"k must be at least 1; got {k}.")


def check_ids(layer: LayerLayout, ids: torch.Tensor, num_rows: int) -> None:
    """Raise a MemoryMismatchError for row ids that are not (Hkv, ...), or were never given out."""
    num_heads = layer.num_key_value_heads
    if ids.ndim < 1 or ids.shape[0] != num_heads or ids.dtype != torch.int64:
        raise MemoryMismatchError(
            f"ids must be int64 of shape (num_key_value_heads={num_heads}, ...); "
            f"got {ids.dtype} {tuple(ids.shape)}."
        )
    if ids.numel():
        least, greatest = (int(bound) for bound in ids.aminmax())
        if not -1 <= least <= greatest < num_rows:
            raise MemoryMismatchError(
                f"row ids must be less than {num_rows}, the rows written so far, or -1; "
                f"got {least} to {greatest}."
            )


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that tensors can live on; raise a MemoryMismatchError for others."""
    try:
        usable = torch.device(device)
        if usable.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=usable)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MemoryMismatchError(
            f"memory_device must be a device of this machine, such as 'cpu'; got '{device}': "
            f"{reason}"
        ) from error
    return usable
