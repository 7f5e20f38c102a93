"""`memory_type="vector_db"`: rows in mapped files, one FAISS index for each (layer, KV head).

FAISS answers with positions; `ids[position]` is the row, and keys and values come from our own
mapped rows. All indexes hold the same rows in the same order, so one array of ids serves them all.
The FAISS files are a cache: what is written after them is added in RAM when a layer is first
searched, and they are made anew by `save`. Removed rows stay in the index, unselected, until then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from memory_backends.base import MemoryBackend, Precision, SearchResult, Sinks
from memory_backends.errors import MemoryMismatchError, StoreError, reported
from memory_backends.layout import Int64Array, MemoryLayout
from memory_backends.validation import check_generation
from memory_backends.vector_db import index as faiss_index
from memory_backends.vector_db.index import Float32Array

_ROWS_PER_READ = 65_536
_QUERIES_TO_SHARE = 32  # from here on, heads are searched in several threads


class _LayerIndexes(NamedTuple):
    """One FAISS index a KV head, all with the first `num_rows` of the backend's `_ids`."""

    num_rows: int
    heads: list[Any]


class VectorDBBackend(MemoryBackend):
    """A persistent memory searched by FAISS.

    Args:
        layout: the shape of the rows.
        path: the store's directory; a temporary one, removed at the end, if None.
        identity: see `MemoryBackend`.
        sinks: see `MemoryBackend`.
        index: "auto" (exact while small, then IVF) or a FAISS factory string.
        indexed_layers: the layers that `save` writes FAISS files for; all if None. Others can be
            searched too, with an index made in RAM.

    Raises:
        IndexFactoryError: FAISS rejects `index`, or it cannot serve a memory.
        MemoryMismatchError: `indexed_layers` has a layer that the layout has not; see also
            `MemoryBackend`.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        *,
        path: Path | str | None = None,
        identity: Mapping[str, Any] | None = None,
        sinks: Sinks = "all",
        index: str = "auto",
        indexed_layers: Iterable[int] | None = None,
    ) -> None:
        for dim in {layer.head_dim for layer in layout.layers.values()}:
            faiss_index.check_factory(index, dim)
        self._indexed_layers = sorted(layout.layers if indexed_layers is None else indexed_layers)
        if not set(self._indexed_layers) <= set(layout.layers):
            raise MemoryMismatchError(
                f"indexed_layers must be some of {sorted(layout.layers)}; "
                f"got {self._indexed_layers}."
            )
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="emt-")) / "store"
            weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)
            self._is_temporary = True
        self._index_option = index
        self._indexes: dict[int, _LayerIndexes] = {}
        self._parameters: dict[int, Any] = {}  # layer -> FAISS search parameters
        self._building = threading.Lock()
        self._num_workers = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="emt-search")
        super().__init__(layout, path=path, identity=identity, sinks=sinks)
        self._read_cache_settings()

    def save(self, path: Path | str | None = None) -> None:
        """Bring the FAISS files up to date; with a path, those of a copy of the memory there.

        Raises:
            StoreError: the store or the copy cannot be written; the store serves as before.
        """
        super().save(path)
        target = self._copy_target(path)
        if target is None:
            with self._writing():
                self._rows_changed()  # another process may have written
                self._write_indexes()
            return
        copy = VectorDBBackend(
            self.layout,
            path=target,
            sinks=self.sinks,
            index=self._index_option,
            indexed_layers=self._indexed_layers,
        )
        with contextlib.closing(copy):
            copy.save()

    def close(self) -> None:
        """Let go of threads and files; the object is of no use afterwards."""
        self._pool.shutdown(wait=True)
        super().close()

    @property
    def factory(self) -> str:
        """The factory string that the indexes are built with now."""
        return self._factory

    def _candidates(self, layer_idx: int, unit_queries: torch.Tensor, k: int) -> SearchResult:
        indexes = self._layer_indexes(layer_idx)
        parameters = self._parameters.get(layer_idx)
        if parameters is None:
            parameters = faiss_index.search_parameters(indexes[0], self._searchable_bitmap)
            self._parameters[layer_idx] = parameters
        queries = unit_queries.cpu().numpy()
        num_heads, num_queries, _ = queries.shape
        scores = np.empty((num_heads, num_queries, k), dtype=np.float32)
        positions = np.empty((num_heads, num_queries, k), dtype=np.int64)

        def search_heads(first: int) -> None:
            with faiss_index.one_thread():
                for head in range(first, num_heads, step):
                    scores[head], positions[head] = faiss_index.search(
                        indexes[head], queries[head], k, parameters
                    )

        # A few queries are found sooner than another thread wakes up.
        step = min(num_heads, self._num_workers) if num_queries >= _QUERIES_TO_SHARE else 1
        pending = [self._pool.submit(search_heads, first) for first in range(1, step)]
        if k:
            search_heads(0)
        for task in pending:
            task.result()
        ids = np.where(positions < 0, -1, self._ids[positions]) if k else positions
        return SearchResult(torch.from_numpy(scores), torch.from_numpy(ids))

    @property
    def _precision(self) -> Precision:
        return faiss_index.precision_of(self._factory)

    # -- the set of indexed rows ----------------------------------------------------------------

    @property
    def _directory(self) -> Path:
        assert self.path is not None  # __init__ sees to it
        return self.path

    def _rows_changed(self) -> None:
        super()._rows_changed()
        self._plan()

    def _read_cache_settings(self) -> None:
        """Decide whether the FAISS files can be used, and which rows they hold."""
        saved = self._catalog.setting("index") or {}
        generation = check_generation(saved["generation"]) if saved else ""
        folder = self._directory / "index" / generation
        usable = self._index_option in ("auto", saved.get("option")) and folder.is_dir()
        self._cache = folder if saved and usable else None
        self._ids = np.empty(0, dtype=np.int64)
        if self._cache is not None:
            self._ids = _read_ids(self._cache, saved["num_rows"], self._rows.num_rows)
        self._cached_layers = saved.get("layers", []) if self._cache else []
        self._cached_rows = len(self._ids)
        self._factory = saved["factory"] if self._cache else ""
        self._plan()

    def _plan(self) -> None:
        """Line up the indexes with the rows that a search may find."""
        wanted = self._searchable_rows()
        factory = faiss_index.factory_for(
            self._index_option, len(wanted), self.layout.largest_head_dim
        )
        if self._factory in ("", "Flat") and factory != self._factory:
            self._forget_indexes(factory)  # the first build, or one grown out of "Flat"
        missing = np.setdiff1d(wanted, self._ids, assume_unique=True)
        self._ids = np.concatenate([self._ids, missing])
        unselected = len(wanted) < len(self._ids)
        selected = np.isin(self._ids, wanted, assume_unique=True) if unselected else None
        self._parameters.clear()
        self._searchable_bitmap = (
            None if selected is None else np.packbits(selected, bitorder="little")
        )

    def _forget_indexes(self, factory: str) -> None:
        self._factory = factory
        self._cache, self._cached_layers, self._cached_rows = None, [], 0
        self._ids = np.empty(0, dtype=np.int64)
        self._indexes.clear()

    # -- building -------------------------------------------------------------------------------

    def _layer_indexes(self, layer_idx: int) -> list[Any]:
        """Return the layer's indexes, one a KV head, with all of `_ids` in them."""
        ready = self._indexes.get(layer_idx)
        if ready is None or ready.num_rows < len(self._ids):
            with self._building:
                ready = self._indexes.pop(layer_idx, None)  # gone if an error leaves them uneven
                if ready is None or ready.num_rows < len(self._ids):
                    ready = self._with_all_rows(layer_idx, ready or self._first_indexes(layer_idx))
                self._indexes[layer_idx] = ready
        return ready.heads

    def _first_indexes(self, layer_idx: int) -> _LayerIndexes:
        """Read the layer's FAISS files, or return empty indexes if there are none."""
        layer = self._layer(layer_idx)
        heads = range(layer.num_key_value_heads)
        if self._cache is not None and layer_idx in self._cached_layers:
            files = [self._cache / _index_name(layer_idx, head) for head in heads]
            try:
                found = [
                    faiss_index.read_index(file, layer.head_dim, self._cached_rows)
                    for file in files
                ]
                return _LayerIndexes(self._cached_rows, found)
            except StoreError:
                saved = self._catalog.setting("index") or {}
                if self._cache.is_dir() and saved.get("generation") == self._cache.name:
                    raise
                # Another process has saved since and removed these files; the rows are there.
        return _LayerIndexes(
            0, [faiss_index.new_index(self._factory, layer.head_dim) for _ in heads]
        )

    def _with_all_rows(self, layer_idx: int, indexes: _LayerIndexes) -> _LayerIndexes:
        """Add to a layer's indexes what of `_ids` they lack."""
        for head, index in enumerate(indexes.heads):
            if len(self._ids) and not index.is_trained:
                wanted = max(faiss_index.training_rows(index), 1)
                sample = self._ids[:: max(len(self._ids) // wanted, 1)]
                index.train(self._unit_keys(layer_idx, head, sample))
        for ids in _batches(self._ids[indexes.num_rows :]):
            for head, index in enumerate(indexes.heads):
                index.add(self._unit_keys(layer_idx, head, ids))
        return _LayerIndexes(len(self._ids), indexes.heads)

    def _unit_keys(self, layer_idx: int, head: int, ids: Int64Array) -> Float32Array:
        """Read the L2-normalised keys of rows, (n, head_dim) float32."""
        head_dim = self._layer(layer_idx).head_dim
        if np.all(np.diff(ids) == 1):  # a span, read in order
            keys = self._rows.span(layer_idx, int(ids[0]), int(ids[-1]) + 1)[:, head, :head_dim]
        else:
            heads = self._layer(layer_idx).num_key_value_heads
            rows = torch.from_numpy(ids).expand(heads, -1)
            keys = self._rows.gather(layer_idx, rows)[head, :, :head_dim]
        unit: Float32Array = torch.nn.functional.normalize(keys.float(), dim=-1).numpy()
        return np.ascontiguousarray(unit)

    def _write_indexes(self) -> None:
        """Write all FAISS files to a new generation and make it the store's."""
        settings = self._catalog.setting("index") or {}
        wanted = faiss_index.factory_for(
            self._index_option, len(self._searchable_rows()), self.layout.largest_head_dim
        )
        # Drop removed rows for good; make more lists when the memory has outgrown those it has.
        if self._searchable_bitmap is not None or wanted != self._factory:
            self._forget_indexes(wanted)
            self._plan()
        generation = f"{int(settings.get('generation', '0')) + 1:06d}"
        folder = self._directory / "index" / generation
        with reported(self._directory):
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
            try:
                folder.mkdir(parents=True)
                for layer_idx in self._indexed_layers:
                    in_use = layer_idx in self._indexes
                    for head, index in enumerate(self._layer_indexes(layer_idx)):
                        faiss_index.write_index(index, folder / _index_name(layer_idx, head))
                    if not in_use:  # built to be written: one layer at a time in RAM
                        self._indexes.pop(layer_idx)
                self._ids.astype("<i8").tofile(folder / "ids.bin")
                _sync(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._catalog.set_setting(
                "index",
                {
                    "generation": generation,
                    "option": self._index_option,
                    "factory": self._factory,
                    "layers": self._indexed_layers,
                    "num_rows": len(self._ids),
                },
            )
            for old in (self._directory / "index").iterdir():
                if old.name != generation:
                    shutil.rmtree(old, ignore_errors=True)
        self._cache, self._cached_layers = folder, self._indexed_layers
        self._cached_rows = len(self._ids)


def _index_name(layer_idx: int, head: int) -> str:
    return f"layer-{layer_idx:03d}-head-{head:03d}.faiss"


def _batches(ids: Int64Array) -> Iterator[Int64Array]:
    for start in range(0, len(ids), _ROWS_PER_READ):
        yield ids[start : start + _ROWS_PER_READ]


def _read_ids(folder: Path, num_rows: int, stop: int) -> Int64Array:
    """Read which `num_rows` rows, of ids below `stop`, the FAISS files hold."""
    path = folder / "ids.bin"
    advice = "Delete the folder 'index' of the store: it is made anew from the rows."
    size = path.stat().st_size if path.is_file() else 0
    if size != 8 * num_rows:
        state = f"has {size} bytes" if path.is_file() else "is missing"
        raise StoreError(f"'{path}' {state}; expected {8 * num_rows} bytes. {advice}")
    ids: npt.NDArray[np.int64] = np.fromfile(path, dtype="<i8")
    if num_rows and not 0 <= ids.min() <= ids.max() < stop:
        raise StoreError(
            f"'{path}' is damaged: expected row ids 0 to {stop - 1}; "
            f"got {ids.min()} to {ids.max()}. {advice}"
        )
    return ids


def _sync(folder: Path) -> None:
    """Force a folder's files and names to the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
