"""The KV heads that have FAISS files, and the bytes that leaving out others saves.

A memory of which only some heads are searched needs no index for the others: their rows stay in the
store, and an index can be made of them at any time. The catalogue's setting "index" names the heads
that have files: `"heads": {"0": [1], "2": [0, 1]}`, by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from memory_backends.errors import MemoryMismatchError, StoreError
from memory_backends.layout import MemoryLayout
from memory_backends.search.checks import check_heads

IndexedHeads = Mapping[int, tuple[int, ...]]  # layer -> KV heads, both ascending


class Coverage(NamedTuple):
    """The heads that have FAISS files, and the bytes of these."""

    heads: IndexedHeads
    num_bytes: int
    all_bytes: int  # an estimate for files of all heads, as large for each; 0 if there are none


def all_heads(layout: MemoryLayout, layers: Iterable[int] | None = None) -> IndexedHeads:
    """Return all KV heads of some layers, or of all; a MemoryMismatchError for other layers."""
    chosen = sorted(layout.layers if layers is None else layers)
    if not set(chosen) <= set(layout.layers):
        raise MemoryMismatchError(
            f"indexed_layers must be some of {sorted(layout.layers)}; got {chosen}."
        )
    return {idx: tuple(range(layout.layers[idx].num_key_value_heads)) for idx in chosen}


def checked(layout: MemoryLayout, heads: Mapping[int, Iterable[int]]) -> IndexedHeads:
    """Return the chosen layers and KV heads in ascending order.

    Raises:
        MemoryMismatchError: the layout has no such layer or head, a layer is named without heads,
            or a head twice.
    """
    unknown = sorted(heads.keys() - layout.layers.keys())
    if unknown:
        raise MemoryMismatchError(
            f"indexed_heads must be of layers {sorted(layout.layers)}; got layers {unknown}."
        )
    return {
        idx: tuple(sorted(check_heads(layout.layers[idx], idx, heads[idx])))
        for idx in sorted(heads)
    }


def from_setting(setting: Mapping[str, Any], layout: MemoryLayout) -> IndexedHeads:
    """Read from the setting "index" which heads have files.

    A damaged setting raises a KeyError, TypeError, ValueError or AttributeError.
    """
    return checked(layout, {int(idx): heads for idx, heads in setting["heads"].items()})


def file_name(layer_idx: int, head: int) -> str:
    """Return the name of a head's FAISS file."""
    return f"layer-{layer_idx:03d}-head-{head:03d}.faiss"


def coverage_of(setting: Mapping[str, Any], layout: MemoryLayout) -> Coverage:
    """Read the setting "index"; raise a StoreError if it is damaged."""
    try:
        heads, files = from_setting(setting, layout), setting["files"]
        sizes = {
            (idx, head): int(files[file_name(idx, head)]["size"])
            for idx, chosen in heads.items()
            for head in chosen
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"the record of the index is damaged: {error!r}. "
            "Run `emt rebuild`: the index is made anew from the rows."
        ) from error
    components = sum(layout.layers[idx].head_dim for idx, _ in sizes)
    of_all = sum(layer.num_key_value_heads * layer.head_dim for layer in layout.layers.values())
    num_bytes = sum(sizes.values())
    return Coverage(heads, num_bytes, round(num_bytes * of_all / components) if components else 0)
