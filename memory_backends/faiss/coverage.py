"""Which KV heads of which layers have FAISS files, and what it saves that others have none.

A memory of which only some heads are searched needs no index for the others: their rows stay in the
store, and an index can be made of them at any time. The catalogue's setting "index" says which
heads have files: "layers" names the layers of which all heads have one, and "heads", if it is
there, those of the other layers. So a store whose layers are indexed as a whole has the setting it
always had, and a version that does not know "heads" takes those layers for layers without files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from memory_backends.errors import MemoryMismatchError, StoreError
from memory_backends.layout import MemoryLayout
from memory_backends.search.checks import check_heads

IndexedHeads = Mapping[int, tuple[int, ...]]  # layer -> KV heads, both ascending


class Coverage(NamedTuple):
    """The heads that have FAISS files, and the bytes of these.

    Attributes:
        heads: which they are.
        num_bytes: of their files, if the sizes are known; old stores may not tell.
        all_bytes: an estimate of what files of all heads would take: as many bytes for a key's
            component as in the files there are; 0 if there are none.
    """

    heads: IndexedHeads
    num_bytes: int
    all_bytes: int


def all_heads(layout: MemoryLayout, layers: Iterable[int] | None = None) -> IndexedHeads:
    """Return all KV heads of some layers, or of all layers.

    Raises:
        KeyError: a layer that the layout has not.
    """
    chosen = sorted(layout.layers if layers is None else layers)
    return {idx: tuple(range(layout.layers[idx].num_key_value_heads)) for idx in chosen}


def checked(layout: MemoryLayout, heads: Mapping[int, Iterable[int]]) -> IndexedHeads:
    """Refuse layers and KV heads that the layout has not, and return the heads in order.

    Raises:
        MemoryMismatchError: one of these, a layer without heads, or a head named twice.
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


def to_setting(heads: IndexedHeads, layout: MemoryLayout) -> dict[str, Any]:
    """Return the entries of the setting "index" that say which heads have files."""
    whole = [idx for idx in heads if heads[idx] == all_heads(layout, [idx])[idx]]
    partial = {str(idx): list(found) for idx, found in heads.items() if idx not in whole}
    return {"layers": whole, **({"heads": partial} if partial else {})}


def from_setting(setting: Mapping[str, Any], layout: MemoryLayout) -> IndexedHeads:
    """Read which heads have files; all of the listed layers if nothing is said of single heads.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the setting is damaged, or of another
            layout. MemoryMismatchError is a ValueError.
    """
    whole = all_heads(layout, (int(idx) for idx in setting["layers"]))
    partial = {int(idx): found for idx, found in setting.get("heads", {}).items()}
    return dict(sorted({**whole, **checked(layout, partial)}.items()))


def file_name(layer_idx: int, head: int) -> str:
    """Return the name of a head's FAISS file."""
    return f"layer-{layer_idx:03d}-head-{head:03d}.faiss"


def coverage_of(setting: Mapping[str, Any], layout: MemoryLayout) -> Coverage:
    """Tell from the setting "index" which heads have files, and how big those are.

    Raises:
        StoreError: the setting is damaged.
    """
    try:
        heads, files = from_setting(setting, layout), setting.get("files", {})
        indexed = {file_name(idx, head): idx for idx, found in heads.items() for head in found}
        known = {name: int(files[name]["size"]) for name in indexed if name in files}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"the record of the index is damaged: {error!r}. "
            "Run `emt rebuild`: the index is made anew from the rows."
        ) from error
    components = sum(layout.layers[indexed[name]].head_dim for name in known)
    of_all = sum(layer.num_key_value_heads * layer.head_dim for layer in layout.layers.values())
    there = sum(known.values())
    return Coverage(heads, there, round(there * of_all / components) if components else 0)
