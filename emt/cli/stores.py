"""The subcommands without a model: info, remove, verify, compact, rebuild."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import memory_backends
from emt.cli import profiling
from emt.cli.printing import bytes_used, count, print_json, size
from emt.cli.session import existing
from emt.errors import DocumentError, StoreError
from memory_backends import MemoryBackend
from memory_backends.catalog import Catalog
from memory_backends.faiss.coverage import IndexedHeads, coverage_of
from memory_backends.layout import MemoryLayout

_INDEX_FACTS = ("factory", "num_rows", "recall", "attention", "scanned")
_LAYERS_NAMED = 8


def info(options: argparse.Namespace) -> None:
    """Describe a store, without reading its rows."""
    store = existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        documents = catalog.document_sizes()
        index = catalog.setting("index") or {}
        described = {
            "store": str(store),
            "format_version": catalog.setting("format_version"),
            "model": {"source": catalog.setting("model"), **catalog.identity},
            "config": catalog.setting("config"),
            "documents": [{"name": n, "tokens": t, "rows": r} for n, t, r in documents],
            "tokens": sum(tokens for _, tokens, _ in documents),
            "rows": len(catalog.searchable_rows("all")),
            "layers": len(catalog.layout.layers),
            "row_codec": catalog.row_codec,
            "index": {
                **{key: index[key] for key in _INDEX_FACTS if key in index},
                **(_coverage(index, catalog.layout) if index else {}),
            },
            "profile": profiling.describe(catalog),
            "bytes": {
                "rows": bytes_used(store / "rows"),
                "index": bytes_used(store / "index"),
                "total": bytes_used(store),
                "per_row": catalog.bytes_per_row,
            },
        }
    if options.json:
        print_json(described)
        return
    sizes = described["bytes"]
    print(f"store      {store}")
    print(f"model      {described['model']['source']} ({described['model'].get('model_type')})")
    print(f"documents  {len(documents):,}")
    print(f"tokens     {described['tokens']:,}")
    print(f"rows       {described['rows']:,} in each of {described['layers']} layers")
    print(f"index      {_in_words(described['index'])}")
    if index:
        print(f"heads      {_heads_in_words(described['index'])}")
    print(f"profile    {profiling.in_words(described['profile'])}")
    print(
        f"size       {size(sizes['total'])}: rows {size(sizes['rows'])} "
        f"({sizes['per_row']:,} bytes a token, {described['row_codec']}), "
        f"index {size(sizes['index'])}"
    )
    for name, tokens, rows in documents:
        print(f"  {name}  {count(tokens, 'token')}, {count(rows, 'row')}")


def remove(options: argparse.Namespace) -> None:
    """Remove documents; their space is given back by `compact`."""
    store = existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        unknown = [name for name in options.document if not catalog.has_document(name)]
    if unknown:
        raise DocumentError(
            f"no document '{unknown[0]}' in '{store}'; nothing was removed. "
            "`emt info` lists the documents."
        )
    names = dict.fromkeys(options.document)
    with contextlib.closing(MemoryBackend.open(store, "vector_db", index_files=False)) as backend:
        rows = sum(backend.remove_document(name) for name in names)
    print(
        f"removed {count(len(names), 'document')}, {count(rows, 'row')}, from '{store}'; "
        "`emt compact` gives back their space"
    )


def verify(options: argparse.Namespace) -> int:
    """Read every file of a store; return 1 if one is damaged."""
    store = existing(options.store)
    damaged = memory_backends.verify(store)
    if options.json:
        found = [{"file": str(damage.file), "reason": damage.reason} for damage in damaged]
        print_json({"store": str(store), "damaged": found})
    elif damaged:
        for damage in damaged:
            print(f"{damage.file}: {damage.reason}")
        files = len({str(damage.file) for damage in damaged})
        print(
            f"emt: {count(files, 'file')} of '{store}' {'is' if files == 1 else 'are'} damaged.",
            file=sys.stderr,
        )
    else:
        print(f"no damage in the {size(bytes_used(store))} of '{store}'")
    return 1 if damaged else 0


def compact(options: argparse.Namespace) -> None:
    """Give back the space of what was removed."""
    store = existing(options.store)
    with contextlib.closing(_opened(store)) as backend:
        given_back = backend.compact()
    print(f"gave back {size(given_back)}; '{store}' has {size(bytes_used(store))}")


def rebuild(options: argparse.Namespace) -> None:
    """Make the FAISS files anew from the rows."""
    store = existing(options.store)
    with contextlib.closing(_opened(store)) as backend:
        backend.rebuild()
        index = backend.catalog.setting("index") or {}
    print(f"rebuilt {_in_words(index)}; the index has {size(bytes_used(store / 'index'))}")


def _opened(store: Path) -> MemoryBackend:
    """Open a store as it was indexed: with the settings and for the heads it has."""
    with contextlib.closing(Catalog.open(store)) as catalog:
        config = catalog.setting("config") or {}
        heads = _heads_to_index(catalog)
    return MemoryBackend.open(
        store,
        "vector_db",
        index=config.get("index", "auto"),
        sinks=config.get("sinks", "all"),
        recall=config.get("search_recall", 0.95),
        indexed_heads=heads,
        index_files=False,  # they may be what is damaged
    )


def _heads_to_index(catalog: Catalog) -> IndexedHeads | None:
    """Return which heads have FAISS files; None, for all, if there are none or nobody knows."""
    setting = catalog.setting("index")
    try:
        return coverage_of(setting, catalog.layout).heads if setting else None
    except StoreError:  # `rebuild` makes a damaged record anew
        return None


def _coverage(index: dict[str, Any], layout: MemoryLayout) -> dict[str, Any]:
    """Return which heads have FAISS files, the bytes of these, and about how many that saves."""
    heads, num_bytes, all_bytes = coverage_of(index, layout)
    return {
        "heads": {str(layer_idx): list(found) for layer_idx, found in heads.items()},
        "num_heads": sum(map(len, heads.values())),
        "all_heads": sum(layer.num_key_value_heads for layer in layout.layers.values()),
        "file_bytes": num_bytes,
        "saved_bytes_estimate": max(all_bytes - num_bytes, 0),
    }


def _heads_in_words(index: dict[str, Any]) -> str:
    """Say which heads are indexed, as layer.head, and what it saves that the others are not."""
    num_heads, of_all = index["num_heads"], index["all_heads"]
    files = f"FAISS files {size(index['file_bytes'])}"
    if num_heads == of_all:
        return f"all {count(of_all, 'head')}, {files}"
    names = [_run(layer_idx, heads) for layer_idx, heads in index["heads"].items()]
    named = ", ".join(names[:_LAYERS_NAMED])
    if len(names) > _LAYERS_NAMED:
        named += f" and those of {count(len(names) - _LAYERS_NAMED, 'layer')} more"
    words = f"{num_heads} of {count(of_all, 'head')}" + (f" ({named})" if named else "")
    if not index["file_bytes"]:
        return words
    saved = size(index["saved_bytes_estimate"])
    return f"{words}, {files}: about {saved} less than all heads, estimated from these files"


def _run(layer_idx: str, heads: list[int]) -> str:
    """Name heads of one layer: "17.1", "17.0, 17.2" or, for a run of them, "17.0-2"."""
    if len(heads) > 1 and heads == list(range(heads[0], heads[-1] + 1)):
        return f"{layer_idx}.{heads[0]}-{heads[-1]}"
    return ", ".join(f"{layer_idx}.{head}" for head in heads)


def _in_words(index: dict[str, Any]) -> str:
    """Describe an index: its factory, and what it was measured to find."""
    if not index:
        return "none yet"
    words = f"{index['factory']} over {count(index['num_rows'], 'row')}"
    if "recall" in index:
        words += (
            f", finds {index['recall']:.1%} of the nearest 10 rows, which get "
            f"{index['attention']:.1%} of their attention, in {index['scanned']:.1%} of the rows"
        )
    return words
