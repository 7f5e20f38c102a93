"""Checks of documents, rows and queries, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import numpy as np

from memory_backends.catalog.metadata import check_metadata
from memory_backends.errors import DocumentError, MemoryMismatchError
from memory_backends.layout import Document, MemoryLayout, Rows
from memory_backends.rows.query_samples import sampled_rows


def check_document(document: Document) -> None:
    """Raise a DocumentError if the parts of a document do not fit together."""
    if not document.name:
        raise DocumentError("a document needs a name; got ''. Give it one, such as its file's.")
    try:
        document.name.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"the name of document {document.name!a} has characters that are not Unicode, as of a "
            "file whose name is not UTF-8. Give it another name."
        ) from error
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
    """Raise a MemoryMismatchError for a run of rows that does not fit, or cannot be searched.

    They must be the layout's and the document's, of which `first` came before, for messages.
    Numbers must be finite, and keys not zero.
    """
    _check_tokens(rows, document)
    for idx, layer in layout.layers.items():
        heads, num_rows = layer.num_key_value_heads, len(rows)
        parts = (
            ("keys", rows.keys, "head_dim", layer.head_dim),
            ("values", rows.values, "value_head_dim", layer.value_head_dim),
        )
        for name, tensors, dim_name, dim in parts:
            tensor = tensors.get(idx)
            if tensor is None:
                raise MemoryMismatchError(
                    f"{name} must have layers {sorted(layout.layers)}; got {sorted(tensors)}. "
                    f"Layer {idx} is missing."
                )
            if tuple(tensor.shape) != (heads, num_rows, dim) or tensor.dtype != layout.dtype:
                raise MemoryMismatchError(
                    f"{name} of layer {idx} must have shape (num_key_value_heads={heads}, "
                    f"N={num_rows}, {dim_name}={dim}) and dtype {layout.dtype}; got "
                    f"{tuple(tensor.shape)}, {tensor.dtype}. Pass KV heads, before repeating them."
                )
            _check_numbers(tensor, name, idx, first)


def check_queries(
    rows: Rows, layout: MemoryLayout, num_heads: Mapping[int, int], first: int
) -> None:
    """Raise a MemoryMismatchError for queries that are not those of a run of rows.

    They must have as many heads, by layer, as `num_heads` of the samples before. Those that are to
    be kept, which depends on the rows' `first` id, must be finite.
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
        samples = queries[:, kept.to(queries.device)]
        if not (samples.is_floating_point() and bool(torch.isfinite(samples).all())):
            raise MemoryMismatchError(
                f"queries of layer {idx} must be finite and of a floating dtype; "
                f"got {queries.dtype} with others. Check the model's dtype."
            )


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


def _check_numbers(tensor: torch.Tensor, name: str, layer_idx: int, first: int) -> None:
    bad = ~torch.isfinite(tensor).all(dim=-1)  # (Hkv, n)
    fault = "NaN or infinite. float16 overflows where bfloat16 does not: check the model's dtype"
    if name == "keys" and not bad.any():
        bad = (tensor == 0).all(dim=-1)
        fault = "zero: it has no direction to search by. Check the model's weights"
    if bad.any():
        head, row = bad.nonzero()[0].tolist()
        raise MemoryMismatchError(
            f"{name} must be finite, and keys not zero; "
            f"got one at layer {layer_idx}, KV head {head}, row {first + row} that is {fault}."
        )
