"""Copying a memory to another directory: records as they are, rows in RAM encoded."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from memory_backends.catalog.records import RecordSpan
from memory_backends.errors import StoreError
from memory_backends.rows import files, query_samples
from memory_backends.rows.append_files import sync_path
from memory_backends.rows.coding import RowCoding
from memory_backends.rows.files import RowFiles
from memory_backends.rows.query_samples import QuerySamples
from memory_backends.store.derived import copy_derived, remove_derived
from memory_backends.store.store import Store

_ROWS_AT_ONCE = 4096


def copy_store(store: Store, directory: Path) -> None:
    """Write a copy of a memory to an empty directory, with holes for removed rows."""
    directory.mkdir(parents=True, exist_ok=True)
    catalog, samples = store.catalog, store.samples
    try:
        with (
            contextlib.closing(RowFiles(store.layout, directory, 0, _coding(store))) as new_rows,
            contextlib.closing(QuerySamples(store.layout, directory, {})) as new_samples,
        ):
            names = _copy_rows(store, new_rows)
            flushed = new_rows.flush()
            for layer_idx in samples.num_heads:
                new_samples.append_samples(layer_idx, samples.layer(layer_idx))
            new_samples.flush()
            new_rows.show(catalog.num_rows)
            new_samples.show(catalog.query_samples())
        row_crc32 = dict(zip(names, flushed.row_crc32, strict=True))
        if catalog.path is not None:
            copy_derived(catalog.path.parent, directory)
        catalog.copy_to(directory, row_crc32, flushed.codec_states)  # last: it makes a store of it
        sync_path(directory)
    except BaseException:
        for folder in (files.FOLDER, query_samples.FOLDER):
            shutil.rmtree(directory / folder, ignore_errors=True)
        remove_derived(directory)
        raise


def _coding(store: Store) -> RowCoding:
    """Return a store's coding, or one that has learned from rows in RAM, if there are enough."""
    if isinstance(store.rows, RowFiles):
        return store.rows.coding
    catalog = store.catalog
    coding = RowCoding(store.layout, catalog.row_codec, fine_heads=catalog.fine_heads)
    if coding.must_learn and catalog.document_sizes():
        spans = [torch.arange(span.first, span.stop) for span in catalog.record_spans()]
        first = torch.cat(spans)[: files.ROWS_TO_LEARN]
        if len(first) < files.ROWS_TO_LEARN:
            return coding
        for layer_idx, layer in store.layout.layers.items():
            ids = first.expand(layer.num_key_value_heads, -1)
            rows = store.rows.gather(layer_idx, ids).transpose(0, 1).cpu()
            coding.learn(layer_idx, rows, store.samples.grouped(layer_idx).flatten(1, 2))
    return coding


def _copy_rows(store: Store, target: RowFiles) -> list[str]:
    """Copy the rows of all documents to their places; return the documents' names."""
    names, end = [], 0
    for span in store.catalog.record_spans():
        target.skip(span.first - end)
        end = span.stop
        for first in range(span.first, span.stop, _ROWS_AT_ONCE):
            stop = min(first + _ROWS_AT_ONCE, span.stop)
            for layer_idx in store.layout.layers:
                if isinstance(store.rows, RowFiles):
                    records = store.rows.records(layer_idx, first, stop)
                    target.append_records(layer_idx, records)
                else:
                    target.append_rows(layer_idx, store.rows.span(layer_idx, first, stop))
        target.seal()
        _check_copied(store, span, target.row_crc32[-1])
        names.append(span.name)
    target.skip(store.catalog.num_rows - end)
    return names


def _check_copied(store: Store, span: RecordSpan, row_crc32: Mapping[int, int]) -> None:
    copied = tuple(row_crc32[layer_idx] for layer_idx in sorted(row_crc32))
    if store.catalog.path is not None and copied != span.row_crc32:
        raise StoreError(
            f"the rows of document '{span.name}' in '{store.path}' are damaged: their checksum "
            "does not match. `emt verify` lists all damage; index the document again."
        )
