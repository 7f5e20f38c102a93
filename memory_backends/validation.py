"""What a backend refuses before it changes anything: rows, documents, queries and directories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import torch
import numpy as np

from memory_backends.database import FILE_NAME as CATALOG_FILE_NAME
from memory_backends.errors import DocumentError, MemoryMismatchError, StoreError
from memory_backends.layout import Document, LayerLayout, MemoryLayout, Rows
from memory_backends.lock import LOCK_FILE_NAME, OWNER_FILE_NAME
from memory_backends.metadata import check_metadata
from memory_backends.queries import sampled_rows


def check_document(document: Document) -> None:
    """Refuse a document whose parts do not fit together.

    Raises:
        DocumentError: an empty name, token ids that are not (T,), offsets that are not (T, 2),
            metadata that is not flat.
    """
    if not document.name:
        raise DocumentError("a document needs a name; got ''. Give it one, such as its file's.")
    ids = np.shape(document.token_ids)
    if len(ids) != 1:
        raise DocumentError(
            f"token_ids of document '{document.name}' must have shape (T,); got {ids}."
        )
    if document.offsets is not None and np.shape(document.offsets) != (*ids, 2):
        raise DocumentError(
            f"offsets of document '{document.name}' must have shape (T={ids[0]}, 2), one span of "
            f"characters a token; got {np.shape(document.offsets)}."
        )
    if document.metadata is not None:
        check_metadata(document.metadata, document.name)


def check_rows(rows: Rows, layout: MemoryLayout, document: Document, first: int) -> None:
    """Refuse rows that are not the layout's or not the document's, or that cannot be searched.

    Args:
        rows: a run of the document's rows.
        layout: the shape that they must have.
        document: whose tokens they say they are.
        first: how many rows of the document came before them, for messages.

    Raises:
        MemoryMismatchError: a shape, dtype or layer that is not the layout's, a token that is not
            the document's, a key or value that is NaN or infinite, a key that is zero.
    """
    _check_tokens(rows, document)
    for idx, layer in layout.layers.items():
        heads, num_rows = layer.num_key_value_heads, len(rows)
        parts = (
            ("keys", rows.keys, "head_dim", layer.head_dim),
            ("values", rows.values, "value_head_dim", layer.value_head_dim),
        )
        for name, tensors, dim_name, dim in parts:
            found = tensors.get(idx)
            if found is None:
                raise MemoryMismatchError(
                    f"{name} must have layers {sorted(layout.layers)}; got {sorted(tensors)}. "
                    f"Layer {idx} is missing."
                )
            if tuple(found.shape) != (heads, num_rows, dim) or found.dtype != layout.dtype:
                raise MemoryMismatchError(
                    f"{name} of layer {idx} must have shape (num_key_value_heads={heads}, "
                    f"N={num_rows}, {dim_name}={dim}) and dtype {layout.dtype}; got "
                    f"{tuple(found.shape)}, {found.dtype}. Pass KV heads, before repeating them."
                )
            _check_numbers(found, name, idx, first)


def check_queries(
    rows: Rows, layout: MemoryLayout, num_heads: Mapping[int, int], first: int
) -> None:
    """Refuse queries that are not those of these rows, or of other heads than those before.

    Args:
        rows: a run of a document's rows, with queries or without.
        layout: the shape of the memory.
        num_heads: layer -> query heads, of the layers of which there are samples already.
        first: the id of the first row, on which it depends which queries are kept.

    Raises:
        MemoryMismatchError: a layer, shape or dtype that does not fit, or a query to be kept that
            is NaN or infinite.
    """
    kept = torch.from_numpy(sampled_rows(first, first + len(rows)) - first)
    for idx, queries in rows.queries.items():
        layer = layout.layers.get(idx)
        if layer is None:
            raise MemoryMismatchError(
                f"queries must be of layers {sorted(layout.layers)}; got layer {idx}."
            )
        groups = layer.num_key_value_heads
        heads = num_heads.get(idx, queries.shape[0] if queries.ndim else 0)
        expected = (heads, len(rows), layer.head_dim)
        if tuple(queries.shape) != expected or heads % groups or not heads:
            wanted = f"H={num_heads[idx]}" if idx in num_heads else f"H=a multiple of {groups}"
            raise MemoryMismatchError(
                f"queries of layer {idx} must have shape ({wanted}, N={len(rows)}, "
                f"head_dim={layer.head_dim}); got {tuple(queries.shape)}. "
                "Pass all query heads of the same tokens as the keys."
            )
        found = queries[:, kept.to(queries.device)]
        if not (found.is_floating_point() and bool(torch.isfinite(found).all())):
            raise MemoryMismatchError(
                f"queries of layer {idx} must be finite and of a floating dtype; "
                f"got {queries.dtype} with others. Check the model's dtype."
            )


def check_heads(layer: LayerLayout, layer_idx: int, heads: Iterable[int]) -> tuple[int, ...]:
    """Refuse heads that a layer has not, none at all, or one named twice; return them.

    Raises:
        MemoryMismatchError: any of these.
    """
    found = tuple(heads)
    num_heads = layer.num_key_value_heads
    are_numbers = all(isinstance(head, Integral) and head in range(num_heads) for head in found)
    if not found or not are_numbers or len(set(found)) < len(found):
        raise MemoryMismatchError(
            f"heads must be one or more of the KV heads 0 to {num_heads - 1} of layer {layer_idx}, "
            f"each once; got {list(found)}. Number KV heads, not query heads, and stack the "
            "queries of one head along N."
        )
    return tuple(int(head) for head in found)


def check_search(
    layer: LayerLayout, queries: torch.Tensor, k: int, heads: Sequence[int] | None = None
) -> None:
    """Refuse queries of another shape than (Hkv, N, head_dim), and k below 1.

    With `heads`, queries are (len(heads), N, head_dim).

    Raises:
        MemoryMismatchError: either.
    """
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
    """Refuse row ids of another shape than (Hkv, ...), and ids that were never given out.

    Raises:
        MemoryMismatchError: either.
    """
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


def has_no_store(path: Path) -> bool:
    """Tell whether a store can be made at `path`: nothing is there, or nothing of worth.

    A directory may hold what a process leaves that was killed before it had made its store.
    """
    if not path.exists():
        return True
    locks = (LOCK_FILE_NAME, OWNER_FILE_NAME, OWNER_FILE_NAME + ".partial")
    partial = CATALOG_FILE_NAME + ".partial"  # and SQLite's journal of it
    return path.is_dir() and all(
        entry.name in locks or entry.name.startswith(partial) for entry in path.iterdir()
    )


def check_directory(path: Path) -> Path:
    """Refuse a path that is a file, and return it.

    Raises:
        StoreError: it is one.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"expected a store directory at '{path}'; it is a file. Give a directory.")
    return path


def check_free(path: Path) -> Path:
    """Refuse a path where there is something already, and return it.

    Raises:
        StoreError: there is.
    """
    if not has_no_store(check_directory(path)):
        raise StoreError(
            f"expected a new or an empty directory at '{path}'; it is not empty. "
            "Save to another directory."
        )
    return path


def check_generation(generation: object) -> str:
    """Refuse a name of an index's folder that could lead elsewhere, and return it.

    Raises:
        StoreError: it is not six digits.
    """
    if not (isinstance(generation, str) and re.fullmatch(r"[0-9]{6}", generation)):
        raise StoreError(
            f"an index generation must be six digits, such as '000001'; got {generation!r:.80}. "
            "The store is damaged: restore its catalogue."
        )
    return generation


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that tensors can live on.

    Raises:
        MemoryMismatchError: this machine or this torch has no such device.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise MemoryMismatchError(
            f"memory_device must be a device of this machine, such as 'cpu'; got '{device}': "
            f"{reason}"
        ) from error
    return found


def _check_tokens(rows: Rows, document: Document) -> None:
    if np.shape(rows.tokens) != np.shape(rows.sinks) or np.ndim(rows.tokens) != 1:
        raise MemoryMismatchError(
            "tokens and sinks of rows must both have shape (n,); "
            f"got {np.shape(rows.tokens)} and {np.shape(rows.sinks)}."
        )
    num_tokens = len(document.token_ids)
    if len(rows) and not 0 <= rows.tokens.min() <= rows.tokens.max() < num_tokens:
        raise MemoryMismatchError(
            f"rows of document '{document.name}' must be of its tokens 0 to {num_tokens - 1}; "
            f"got {rows.tokens.min()} to {rows.tokens.max()}."
        )


def _check_numbers(found: torch.Tensor, name: str, layer_idx: int, first: int) -> None:
    bad = ~torch.isfinite(found).all(dim=-1)  # (Hkv, n)
    what = "NaN or infinite. float16 overflows where bfloat16 does not: check the model's dtype"
    if name == "keys" and not bad.any():
        bad = (found == 0).all(dim=-1)
        what = "zero: it has no direction to search by. Check the model's weights"
    if bad.any():
        head, row = bad.nonzero()[0].tolist()
        raise MemoryMismatchError(
            f"{name} must be finite, and keys not zero; "
            f"got one at layer {layer_idx}, KV head {head}, row {first + row} that is {what}."
        )
