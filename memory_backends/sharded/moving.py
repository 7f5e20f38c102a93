"""Making one store of several, or several of one: rows are copied, and get new ids."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import numpy as np

from memory_backends.backend import LayerParts, MemoryBackend
from memory_backends.catalog import Catalog, schema
from memory_backends.catalog.database import transaction
from memory_backends.errors import DocumentError, MemoryMismatchError, StoreError, reported
from memory_backends.layout import Document, Rows, StoredDocument
from memory_backends.registry import SHARDED
from memory_backends.rows.coding import RowCoding
from memory_backends.rows.files import RowFiles
from memory_backends.sharded.placements import shards_at
from memory_backends.sharded.shards import FINGERPRINT
from memory_backends.sharded.store import ShardedStore
from memory_backends.store.directory import check_free
from memory_backends.store.identity import check_identity, check_layout

_ROWS_AT_ONCE = 4096
_ROWS_PER_COMMIT = 8192
# Settings that say what one store has; all others are taken along.
_OWN_SETTINGS = (
    "format_version",
    "layout",
    "identity",
    "row_codec",
    "num_rows",
    "fine_heads",
    "query_samples",
    "index",
    FINGERPRINT,
)


def merge(stores: Sequence[Path], into: Path) -> int:
    """Make one store of several, of which some may be sharded; return its documents.

    Documents come in the order of the stores, and of each store. What they derive from their rows,
    indexes among it, is left behind. Settings are the first store's; where those of several are
    mappings, they are joined. Rows are the same bit for bit, unless a codec quantises them and the
    stores have learned differently what is usual: then they are quantised again.

    Raises:
        MemoryMismatchError: the stores have other models, layouts or codecs than the first.
        DocumentError: documents of several stores have one name.
        StoreError: a store cannot be read, or there is something at `into`.
    """
    return _moved(stores, into, {})


def split(store: Path, into: Path, num_shards: int) -> int:
    """Make a sharded store of a store; return its documents. Errors as for `merge`."""
    return _moved([store], into, {"num_shards": num_shards, "shard_type": "manual"})


def _moved(stores: Sequence[Path], into: Path, sharded: Mapping[str, Any]) -> int:
    """Copy documents to a new store, which gets its name when it is whole."""
    partial = check_free(into).with_name(into.name + ".partial")
    with contextlib.ExitStack() as at_end:
        sources = [
            at_end.enter_context(contextlib.closing(MemoryBackend.open(path))) for path in stores
        ]
        _check(sources)
        if partial.exists():
            raise StoreError(
                f"'{partial}' is in the way: another run writes it, or was killed. Delete it."
            )
        at_end.callback(shutil.rmtree, partial, ignore_errors=True)  # unless it was renamed
        first, memory_type = sources[0], SHARDED if sharded else "manual"
        target = MemoryBackend(
            first.layout,
            memory_type,
            path=partial,
            identity=first.catalog.identity,
            row_codec=first.catalog.row_codec,
            **sharded,
        )
        with contextlib.closing(target), reported(into):
            target.store.choose_fine_heads(first.catalog.fine_heads)
            target.save()  # makes the store
        states = _common_states(stores, first)
        for directory in shards_at(partial):
            _write_states(directory, states)
        target = MemoryBackend.open(partial)
        with contextlib.closing(target), reported(into):
            learns = RowCoding(first.catalog.layout, first.catalog.row_codec).must_learn
            _copy(sources, target, is_same_coding=bool(states) or not learns)
            for key, value in _settings(sources).items():
                target.set_setting(key, value)
            num_documents = len(target.catalog.document_names())
        with reported(into):
            if into.exists():
                shutil.rmtree(into)  # empty, or left by a killed run
            partial.rename(into)
    return num_documents


def _check(sources: Sequence[MemoryBackend]) -> None:
    """Refuse stores that do not fit together."""
    first = sources[0]
    for other in sources[1:]:
        check_layout(other.catalog, first.layout)
        check_identity(other.catalog, first.catalog.identity)
        here, there = (
            (each.catalog.row_codec, str(each.layout.dtype), each.catalog.fine_heads)
            for each in (first, other)
        )
        if here != there:
            raise MemoryMismatchError(
                f"all stores must have one codec; '{first.path}' has {here[0]} ({here[1]}, fine "
                f"heads {dict(here[2])}), and '{other.path}' {there[0]} ({there[1]}, fine heads "
                f"{dict(there[2])}). Index the documents of one of them again."
            )
    names = Counter(name for each in sources for name in each.catalog.document_names())
    twice = [name for name, number in names.items() if number > 1]
    if twice:
        more = f" and {len(twice) - 10} more" if len(twice) > 10 else ""
        shown = ", ".join(f"'{name}'" for name in twice[:10])
        raise DocumentError(
            f"several stores have documents of one name: {shown}{more}. Remove them from all but "
            "one with `emt remove`, or index them by another name."
        )
    missing = [each for each in sources if each.missing_shards]
    if missing:
        raise StoreError(f"'{missing[0].path}' lacks shards {missing[0].missing_shards}.")


def _copy(sources: Sequence[MemoryBackend], target: MemoryBackend, *, is_same_coding: bool) -> None:
    """Copy documents with their rows, and the rows that are removed singly."""
    gone: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
    with target.batch() as batch:
        for source in sources:
            names = source.catalog.document_names()
            last = _last_of_each_shard(names, target)
            searchable = source.catalog.searchable_rows("all")
            for name in names:
                document = source.catalog.document(name)
                stop = document.first_row + len(document.row_tokens)
                ids = np.arange(document.first_row, stop)
                removed = np.flatnonzero(~np.isin(ids, searchable))
                if len(removed):
                    gone[name] = removed
                samples = _samples(source, last[name], len(ids)) if name in last else {}
                runs = _runs(source, document, is_same_coding=is_same_coding)
                batch.append(_plain(document), runs, samples)
                if batch.num_rows >= _ROWS_PER_COMMIT:
                    batch.commit()
        batch.commit()
    for name, places in gone.items():
        target.remove((target.catalog.document(name).first_row + places).tolist())


def _runs(
    source: MemoryBackend, document: StoredDocument, *, is_same_coding: bool
) -> Iterator[Rows]:
    """Yield the rows of a document, some at a time."""
    is_sink = np.zeros(len(document.row_tokens), dtype=bool)
    is_sink[document.sink_rows] = True
    for first in range(0, len(is_sink), _ROWS_AT_ONCE):
        stop = min(first + _ROWS_AT_ONCE, len(is_sink))
        ids = torch.arange(document.first_row + first, document.first_row + stop)
        layers = source.fetch_layers(ids) if source.keeps_rows else _no_rows(source, len(ids))
        yield Rows(
            {idx: keys for idx, (keys, _) in layers.items()},
            {idx: values for idx, (_, values) in layers.items()},
            document.row_tokens[first:stop],
            is_sink[first:stop],
            records=_records(source, int(ids[0]), len(ids)) if is_same_coding else {},
        )


def _no_rows(source: MemoryBackend, num_rows: int) -> LayerParts:
    """Return what stands for rows that a store does not keep: its records are all there is."""
    parts: LayerParts = {}
    for idx, layer in source.layout.layers.items():
        shape = layer.num_key_value_heads, num_rows
        key = torch.ones(*shape, layer.head_dim, dtype=source.layout.dtype)
        parts[idx] = key, torch.ones(*shape, layer.value_head_dim, dtype=source.layout.dtype)
    return parts


def _records(source: MemoryBackend, first: int, num_rows: int) -> dict[int, torch.Tensor]:
    """Return consecutive rows of one document as they are stored; {} if they wait to be coded."""
    store = source.store
    if isinstance(store, ShardedStore) and store.sharded_rows is not None:
        shards, firsts = store.sharded_rows.placements.locate(np.array([first]))
        store, first = store.shards.local(int(shards[0])).store, int(firsts[0])
    rows = store.rows
    if not isinstance(rows, RowFiles) or not rows.is_learned:
        return {}
    return {idx: rows.records(idx, first, first + num_rows) for idx in store.layout.layers}


def _plain(document: StoredDocument) -> Document:
    return Document(
        document.name, document.token_ids, document.text, document.offsets, document.metadata
    )


def _last_of_each_shard(names: Sequence[str], target: MemoryBackend) -> dict[str, slice]:
    """Return the last document of each shard, with its share of the source's query samples."""
    store = target.store
    if not isinstance(store, ShardedStore):
        return {name: slice(None) for name in names[-1:]}
    last = {store.shard_of(name): name for name in names}
    return {name: slice(part, None, len(last)) for part, name in enumerate(last.values())}


def _samples(source: MemoryBackend, share: slice, num_rows: int) -> dict[int, torch.Tensor]:
    """Return some of a store's query samples by layer, (s, H, D) float16; at most a row's one."""
    samples = {}
    for layer_idx in source.layout.layers:
        grouped = source.sampled_queries(layer_idx)[:, share][:, :num_rows]  # (Hkv, s, G, D)
        if grouped.shape[1]:
            samples[layer_idx] = grouped.transpose(0, 1).flatten(1, 2).half()
    return samples


def _settings(sources: Sequence[MemoryBackend]) -> dict[str, Any]:
    """Return the settings that are taken along."""
    settings: dict[str, Any] = {}
    for source in reversed(sources):
        with source.catalog.snapshot():
            keys = [key for (key,) in source.catalog.connection.execute("SELECT key FROM settings")]
        for key in set(keys) - set(_OWN_SETTINGS):
            value, other = source.catalog.setting(key), settings.get(key)
            if isinstance(value, dict) and isinstance(other, dict):
                value = {**other, **value}
            settings[key] = value
    return settings


def _common_states(stores: Sequence[Path], first: MemoryBackend) -> dict[int, bytes]:
    """Return what the codecs of all stores have learned, by layer, if it is the same; else {}."""
    found = []
    for directory in (single for path in stores for single in shards_at(path)):
        with contextlib.closing(Catalog.open(directory)) as catalog:
            if catalog.num_rows and not catalog.has_codec_states():
                return {}
            states = {idx: catalog.codec_state(idx) for idx in first.layout.layers}
            if catalog.num_rows:
                found.append({idx: state for idx, state in states.items() if state is not None})
    return found[0] if found and all(each == found[0] for each in found) else {}


def _write_states(directory: Path, states: Mapping[int, bytes]) -> None:
    """Let the codec of a store without rows know what others have learned."""
    if states:
        catalog = Catalog.open(directory)
        with contextlib.closing(catalog), transaction(catalog.connection):
            schema.write_codec_states(catalog.connection, states)
