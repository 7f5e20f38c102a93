"""`memory_type="vector_db"`: rows in mapped files, one FAISS index for each (layer, KV head).

FAISS answers with positions; `ids[position]` is the row, and keys and values come from our own
mapped rows. All indexes hold the same rows in the same order, so one array of ids serves them all.
The FAISS files are a cache: what is written after them is added in RAM when a layer is first
searched, and they are made anew by `save`. Removed rows stay in the index, unselected, until then.
How many lists of a plain IVF index are searched was calibrated for each head on real queries.
With a GPU, layers that fit are searched and read there, from copies: see `gpu.py`.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import numpy as np
import numpy.typing as npt

from memory_backends.base import MemoryBackend, Sinks
from memory_backends.errors import MemoryMismatchError, StoreError
from memory_backends.layout import Int64Array, MemoryLayout
from memory_backends.row_files import RowFiles
from memory_backends.rows import RowStorage, loaded, take_heads
from memory_backends.scope import Scope
from memory_backends.scores import Precision, Retrieval, SearchResult
from memory_backends.validation import check_search
from memory_backends.vector_db import index as faiss_index
from memory_backends.vector_db.building import add_rows, calibrate
from memory_backends.vector_db.cache import Generation, write_generation
from memory_backends.vector_db.calibration import Effort, least_effort
from memory_backends.vector_db.gpu import (
    GPULayer,
    GPULayers,
    bytes_on_gpu,
    can_select,
    check_gpu_factory,
    gpu_of,
)
from memory_backends.vector_db.index import Float32Array
from memory_backends.vector_db.residency import ResidentLimit
from memory_backends.vector_db.selection import Selection, is_small

_SPARSEST_SPAN = 2  # rows read for each row wanted
_GROWTH = 1.2  # times the rows that it was calibrated on, and an index is calibrated again
# Of `cache_bytes`, what the keys of scopes may take at most.
_SCOPED_SHARE = 8
_MAX_SELECTIONS = 64  # a bit a row each


class _LayerIndexes(NamedTuple):
    """One FAISS index a KV head, all with the first `num_rows` of the backend's `_ids`."""

    num_rows: int
    heads: list[Any]
    efforts: list[list[Effort]]  # what calibration found of each head; empty if nothing

    @property
    def are_mapped(self) -> bool:
        """Whether the inverted lists are in the store's files."""
        return any(faiss_index.mapped_lists(index) is not None for index in self.heads)


class VectorDBBackend(MemoryBackend):
    """A persistent memory searched by FAISS.

    Args:
        layout: the shape of the rows.
        path: the store's directory; a temporary one, removed at the end, if None.
        identity: see `MemoryBackend`.
        sinks: see `MemoryBackend`.
        row_codec: see `MemoryBackend`.
        index: "auto" (exact while small, then IVF) or a FAISS factory string.
        recall: share of the attention to the exact nearest rows that the search of a plain IVF
            index must find, if enough queries were sampled; see `calibration.py`.
        overfetch: for coarse codes, candidates for each row asked for, ranked by their exact keys.
        cache_bytes: bytes of RAM for FAISS files and mapped rows; None for no limit. IVF indexes
            that take more than half of it stay mapped; other kinds, and rows added since the last
            `save`, are in RAM whatever it says. It can be exceeded until 1,024 more rows were read.
        index_files: False leaves the store's FAISS files unread, as if there were none.
        indexed_layers: the layers that `save` writes FAISS files for; all if None. Others can be
            searched too, with an index made in RAM.
        device: a GPU, such as "cuda:0", for copies of as many indexed layers as fit; None or "cpu"
            for none.

    Raises:
        IndexFactoryError: FAISS rejects `index`, or it cannot serve a memory; with a GPU, the
            installed FAISS has no GPU support, or none for such an index.
        MemoryMismatchError: `indexed_layers` has a layer that the layout has not, or the machine
            has no such device; see also `MemoryBackend`.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        *,
        path: Path | str | None = None,
        identity: Mapping[str, Any] | None = None,
        sinks: Sinks = "all",
        row_codec: str = "exact",
        index: str = "auto",
        recall: float = 0.95,
        overfetch: int = 4,
        cache_bytes: int | None = None,
        index_files: bool = True,
        indexed_layers: Iterable[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        gpu = gpu_of(device)
        for dim in {layer.head_dim for layer in layout.layers.values()}:
            faiss_index.check_factory(index, dim)
            if gpu is not None:
                check_gpu_factory(index, dim)
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
        self._recall = recall
        self._overfetch = overfetch
        self._cache_bytes = cache_bytes
        self._limit: ResidentLimit | None = None
        self._indexes: dict[int, _LayerIndexes] = {}
        self._parameters: dict[int, list[Any]] = {}  # layer -> FAISS search parameters a head
        self._selections: dict[Scope, Selection] = {}
        self._building = threading.Lock()
        self._gpu_layers = None if gpu is None else GPULayers(gpu)
        super().__init__(layout, path=path, identity=identity, sinks=sinks, row_codec=row_codec)
        self._read_cache(index_files)
        if cache_bytes is not None:
            self._scopes.num_bytes = min(self._scopes.num_bytes, cache_bytes // _SCOPED_SHARE)
            in_ram = (
                0 if self._cache is None or self._are_mapped(self._cache) else self._cache.num_bytes
            )
            self._limit = ResidentLimit(cache_bytes - in_ram, self._mapped_memory)

    def save(self, path: Path | str | None = None) -> None:
        """Bring the FAISS files up to date; with a path, those of a copy of the memory there.

        Raises:
            StoreError: the store or the copy cannot be written; the store serves as before.
        """
        super().save(path)
        target = self._copy_target(path)
        if target is None:
            with self._writing():
                self._changed()  # another process may have written
                self._write_indexes()
            return
        copy = VectorDBBackend(
            self.layout,
            path=target,
            sinks=self.sinks,
            index=self._index_option,
            recall=self._recall,
            indexed_layers=self._indexed_layers,
        )
        with contextlib.closing(copy):
            copy.save()

    def rebuild(self) -> None:
        """Make the FAISS files anew from the rows.

        Open the store with `index_files=False` to do so when they are damaged.

        Raises:
            StoreError: the store cannot be written; it serves as before.
        """
        with self._writing():
            self._changed()
            self._forget_indexes("")
            self._plan()
            self._write_indexes()

    def close(self) -> None:
        """Let go of files and of the GPU's memory; the object is of no use afterwards."""
        if self._gpu_layers is not None:
            self._gpu_layers.clear()
        super().close()

    @property
    def factory(self) -> str:
        """The factory string that the indexes are built with now."""
        return self._factory

    @property
    def efforts(self) -> dict[int, list[Effort | None]]:
        """What each head's search finds by calibration; None where it was not calibrated."""
        return {
            layer_idx: [
                least_effort(found, self._recall) if found else None
                for found in self._layer_indexes(layer_idx).efforts
            ]
            for layer_idx in self._indexed_layers
        }

    # -- searching ------------------------------------------------------------------------------

    def retrieve(
        self, layer_idx: int, queries: torch.Tensor, k: int, *, scope: Scope | None = None
    ) -> Retrieval:
        """Search, and fetch what was found; see `MemoryBackend`."""
        layer = self._layer(layer_idx)
        scores, ids = self.search(layer_idx, queries, k, scope=scope)
        heads = np.arange(layer.num_key_value_heads).reshape(-1, 1, 1)
        places = np.maximum(ids.numpy(), 0) * layer.num_key_value_heads + heads
        if not len(self):
            rows = torch.zeros(*ids.shape, layer.row_dim, dtype=self.layout.dtype)
        else:
            rows = self._take(layer_idx, places)
        if self._limit is not None:
            self._limit.count(places.size)
        return Retrieval(scores, ids, rows[..., : layer.head_dim], rows[..., layer.head_dim :])

    def nearest(
        self, layer_idx: int, queries: torch.Tensor, k: int, *, scope: Scope | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the keys and values of the nearest rows; see `MemoryBackend`.

        This is what a decode step waits for, at every layer: it does no more than it must.
        """
        layer = self._layer(layer_idx)
        num_heads = layer.num_key_value_heads
        if self._precision != "half" or scope is not None:
            return super().nearest(layer_idx, queries, k, scope=scope)
        check_search(layer, queries, k)
        found = self._layer_indexes(layer_idx)
        parameters = self._parameters_of(layer_idx, found)
        wanted = queries.detach().to("cpu", torch.float32).contiguous().numpy()
        on_gpu = None if self._gpu_layers is None else self._on_gpu(layer_idx, found, k)
        if on_gpu is not None:
            positions = on_gpu.search(wanted, k)[1]
        else:
            positions = np.empty((num_heads, wanted.shape[1], k), dtype=np.int64)
            for head, index in enumerate(found.heads):
                positions[head] = faiss_index.search_positions(
                    index, wanted[head], k, parameters[head]
                )
        if positions.min() < 0:
            return None
        places = self._rows_at(positions, layer_idx) * num_heads  # (Hkv, N, k)
        places += np.arange(num_heads).reshape(-1, 1, 1)
        rows = self._take(layer_idx, places)
        if self._limit is not None:
            self._limit.count(places.size)
        return rows[..., : layer.head_dim], rows[..., layer.head_dim :]

    def _search(
        self, layer_idx: int, queries: torch.Tensor, k: int, scope: Scope | None = None
    ) -> SearchResult:
        if self._precision != "half" or len(self) < k or scope is not None:
            return super()._search(layer_idx, queries, k, scope)
        # FAISS ranks queries of any length alike, and nothing has to be ranked again.
        queries = queries.cpu()
        scores, ids = self._found(layer_idx, queries.numpy(), k)
        lengths = torch.linalg.vector_norm(queries, dim=-1, keepdim=True)
        return SearchResult(
            torch.from_numpy(scores) / lengths.clamp(min=1e-12), torch.from_numpy(ids)
        )

    def _candidates(self, layer_idx: int, unit_queries: torch.Tensor, k: int) -> SearchResult:
        scores, ids = self._found(layer_idx, unit_queries.cpu().numpy(), k)
        return SearchResult(torch.from_numpy(scores), torch.from_numpy(ids))

    def _candidates_in(
        self, scope: Scope, layer_idx: int, unit_queries: torch.Tensor, k: int
    ) -> tuple[SearchResult, Precision]:
        if is_small(len(self._rows_in(scope))):
            return super()._candidates_in(scope, layer_idx, unit_queries, k)
        unit_queries = unit_queries.cpu()
        selection = self._selection_of(scope)
        found = self._found(layer_idx, unit_queries.numpy(), k, selection)
        scores, ids = (torch.from_numpy(part) for part in found)
        if len(selection.unindexed):
            keys = self._unit_keys_of(layer_idx, selection.unindexed)
            more = unit_queries @ keys.transpose(1, 2)  # (Hkv, N, m)
            others = torch.from_numpy(selection.unindexed).expand(more.shape)
            scores, order = torch.cat([scores, more], -1).sort(-1, descending=True)
            scores = scores[..., :k]
            ids = torch.cat([ids, others], -1).gather(-1, order[..., :k])
        short = (ids < 0).any(-1).any(0).nonzero().squeeze(1)
        if len(short):  # the lists that were searched have too few rows of the scope
            best = self._exact_in(scope, layer_idx, unit_queries[:, short], k)
            scores[:, short], ids[:, short] = best.scores, best.ids
        return SearchResult(scores, ids), self._precision

    def _selection_of(self, scope: Scope) -> Selection:
        found = self._selections.get(scope)
        if found is None:
            found = Selection(self._rows_in(scope), self._ids, self._num_rows)
            if len(self._selections) >= _MAX_SELECTIONS:
                self._selections.clear()
            self._selections[scope] = found
        return found

    def _unit_keys_of(self, layer_idx: int, rows: Int64Array) -> torch.Tensor:
        if self._limit is not None:
            self._limit.count(len(rows) * self._layer(layer_idx).num_key_value_heads)
        return super()._unit_keys_of(layer_idx, rows)

    def _found(
        self, layer_idx: int, queries: Float32Array, k: int, selection: Selection | None = None
    ) -> tuple[Float32Array, Int64Array]:
        """Return inner products and row ids, each (Hkv, N, k), for queries (Hkv, N, head_dim)."""
        found = self._layer_indexes(layer_idx)
        indexes, parameters = found.heads, self._parameters_of(layer_idx, found, selection)
        queries = np.ascontiguousarray(queries)
        num_heads, num_queries, _ = queries.shape
        scores = np.empty((num_heads, num_queries, k), dtype=np.float32)
        positions = np.empty((num_heads, num_queries, k), dtype=np.int64)
        if not k:
            return scores, positions
        on_gpu = None
        if self._gpu_layers is not None and selection is None:
            on_gpu = self._on_gpu(layer_idx, found, k)
        if on_gpu is not None:
            scores, positions = on_gpu.search(queries, k)
        else:
            for head in range(num_heads):
                scores[head], positions[head] = faiss_index.search(
                    indexes[head], queries[head], k, parameters[head]
                )
        return scores, np.where(positions < 0, -1, self._rows_at(positions, layer_idx))

    def _take(self, layer_idx: int, places: Int64Array) -> torch.Tensor:
        """Return heads' rows by place, from the GPU if the layer is there."""
        on_gpu = None if self._gpu_layers is None else self._gpu_layers.get(layer_idx)
        if on_gpu is None:
            return self._rows.take(layer_idx, torch.from_numpy(places))
        return take_heads(on_gpu.rows, torch.from_numpy(places).to(on_gpu.rows.device))

    def _on_gpu(self, layer_idx: int, found: _LayerIndexes, k: int) -> GPULayer | None:
        """Return the layer's copy on the GPU; None if this search has to be on the CPU."""
        assert self._gpu_layers is not None  # the caller has looked
        if self._searchable_bitmap is not None or not can_select(k):
            return None
        num_rows, num_indexed, dtype = self._num_rows, len(self._ids), self.layout.dtype

        def sizes() -> dict[int, int]:
            return {
                idx: bytes_on_gpu(self._layer(idx), dtype, num_rows, num_indexed, self._factory)
                for idx in self._indexed_layers
            }

        def rows(device: torch.device) -> torch.Tensor:
            return loaded(self._rows, self.layout, layer_idx, device)

        parameters = self._parameters_of(layer_idx, found)
        return self._gpu_layers.moved(layer_idx, found.heads, parameters, rows, sizes)

    def _rows_at(self, positions: Int64Array, layer_idx: int) -> Int64Array:
        """Return the row of each FAISS position; any for -1."""
        try:
            return self._ids[positions]
        except IndexError:
            raise StoreError(
                f"the FAISS files of layer {layer_idx} are damaged: they name rows up to "
                f"{positions.max()}; expected less than {len(self._ids)}. Run `emt rebuild`."
            ) from None

    def _parameters_of(
        self, layer_idx: int, found: _LayerIndexes, selection: Selection | None = None
    ) -> list[Any]:
        known = self._parameters if selection is None else selection.parameters
        bitmap = self._searchable_bitmap if selection is None else selection.bitmap
        wider = 1.0 if selection is None else selection.wider
        parameters = known.get(layer_idx)
        if parameters is None:
            parameters = []
            for index, efforts in zip(found.heads, found.efforts, strict=True):
                nprobe = least_effort(efforts, self._recall).nprobe if efforts else None
                parameters.append(faiss_index.search_parameters(index, bitmap, nprobe, wider))
            known[layer_idx] = parameters
        return parameters

    def _are_mapped(self, cache: Generation) -> bool:
        """Tell whether FAISS files stay on the disk: where they would take half of the bytes."""
        return self._cache_bytes is not None and 2 * cache.num_bytes > self._cache_bytes

    def _mapped_memory(self) -> Iterator[tuple[int, int]]:
        """Yield address and bytes of everything that is mapped from the store's files now."""
        if isinstance(self._rows, RowFiles):
            for layer_idx in self.layout.layers:
                records = self._rows.files[layer_idx].records
                yield records.data_ptr(), records.nbytes
        for found in list(self._indexes.values()):
            for lists in map(faiss_index.mapped_lists, found.heads):
                if lists is not None:
                    yield int(lists.ptr), lists.totsize

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

    def _read_cache(self, index_files: bool) -> None:
        """Decide whether the FAISS files can be used, and which rows they hold."""
        found, ids = None, np.empty(0, dtype=np.int64)
        before = self._catalog.setting("index") if index_files else None
        try:
            found = Generation.current(self._directory, self._catalog) if before else None
            if found is not None and self._index_option not in ("auto", found.option):
                found = None
            if found is not None:
                ids = found.read_ids(self._num_rows)
        except StoreError:
            is_same = self._catalog.setting("index") == before
            if is_same and self._catalog.setting("num_rows") == self._num_rows:
                raise
            found = None  # another process has written meanwhile; the rows are there
        self._cache, self._ids = found, ids
        self._factory = "" if found is None else found.factory
        self._plan()

    @property
    def _num_rows(self) -> int:
        return self._rows.num_rows

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
        self._searchable_bitmap = (
            None if selected is None else np.packbits(selected, bitorder="little")
        )
        self._selections.clear()
        self._parameters.clear()  # last: a search meanwhile must not keep the old selection
        if self._gpu_layers is not None:
            self._gpu_layers.clear()

    def _forget_indexes(self, factory: str) -> None:
        self._factory = factory
        self._cache = None
        self._ids = np.empty(0, dtype=np.int64)
        self._indexes.clear()

    # -- building -------------------------------------------------------------------------------

    def _layer_indexes(self, layer_idx: int) -> _LayerIndexes:
        """Return the layer's indexes, one a KV head, with all of `_ids` in them."""
        ready = self._indexes.get(layer_idx)
        if ready is None or ready.num_rows < len(self._ids):
            with self._building:
                ready = self._indexes.pop(layer_idx, None)  # gone if an error leaves them uneven
                if ready is None or ready.num_rows < len(self._ids):
                    ready = self._with_all_rows(layer_idx, ready or self._first_indexes(layer_idx))
                self._indexes[layer_idx] = ready
                self._parameters.pop(layer_idx, None)
                self._selections.clear()
        return ready

    def _first_indexes(self, layer_idx: int, *, in_ram: bool = False) -> _LayerIndexes:
        """Read the layer's FAISS files, or return empty indexes if there are none."""
        layer = self._layer(layer_idx)
        heads = range(layer.num_key_value_heads)
        cache = self._cache
        if cache is not None and layer_idx in cache.layers:
            mapped = self._are_mapped(cache) and not in_ram
            try:
                found = [
                    cache.read_head(layer_idx, head, layer.head_dim, mapped=mapped)
                    for head in heads
                ]
            except StoreError:
                if cache.is_in_force(self._catalog):
                    raise
                # Another process has saved since and removed these files; the rows are there.
            else:
                efforts = cache.efforts.get(layer_idx, [[] for _ in heads])
                return _LayerIndexes(cache.num_rows, found, efforts)
        empty = [faiss_index.new_index(self._factory, layer.head_dim) for _ in heads]
        return _LayerIndexes(0, empty, [[] for _ in heads])

    def _with_all_rows(self, layer_idx: int, found: _LayerIndexes) -> _LayerIndexes:
        """Add to a layer's indexes what of `_ids` they lack, and calibrate them if they are new."""
        rows = _LayerRows(self, layer_idx)
        if found.num_rows < len(self._ids) and found.are_mapped:  # from files, which cannot grow
            found = self._first_indexes(layer_idx, in_ram=True)
        add_rows(found.heads, rows, found.num_rows, self._ids)
        efforts = found.efforts
        has_grown = len(self._ids) > _GROWTH * found.num_rows
        if len(self._ids) and (has_grown or not any(efforts)):
            is_sink = np.isin(self._ids, self._catalog.sink_rows())
            efforts = calibrate(found.heads, rows, self._ids, is_sink)
        return _LayerIndexes(len(self._ids), found.heads, efforts)

    def _write_indexes(self) -> None:
        """Write all FAISS files to a new generation and make it the store's."""
        wanted = faiss_index.factory_for(
            self._index_option, len(self._searchable_rows()), self.layout.largest_head_dim
        )
        # Drop removed rows for good; make more lists when the memory has outgrown those it has.
        if self._searchable_bitmap is not None or wanted != self._factory:
            self._forget_indexes(wanted)
            self._plan()
        if self._cache is not None and (
            self._cache.num_rows == len(self._ids)
            and list(self._cache.layers) == self._indexed_layers
            and self._cache.is_in_force(self._catalog)
        ):
            self._cache.remove_others()
            return  # up to date

        def built(layer_idx: int) -> tuple[list[Any], list[list[Effort]]]:
            in_use = layer_idx in self._indexes
            indexes = self._layer_indexes(layer_idx)
            if not in_use:  # built to be written: one layer at a time in RAM
                self._indexes.pop(layer_idx)
            if indexes.are_mapped:  # FAISS would write a reference to the file they are in
                first = self._first_indexes(layer_idx, in_ram=True)
                indexes = self._with_all_rows(layer_idx, first)
            return indexes.heads, indexes.efforts

        self._cache = write_generation(
            self._directory,
            self._catalog,
            self._ids,
            {idx: functools.partial(built, idx) for idx in self._indexed_layers},
            option=self._index_option,
            factory=self._factory,
            recall=self._recall,
        )


class _LayerRows:
    """One layer's keys and sampled queries, for building."""

    def __init__(self, backend: VectorDBBackend, layer_idx: int) -> None:
        self._backend = backend
        self._rows: RowStorage = backend._rows
        self._layer_idx = layer_idx
        self._layer = backend.layout.layers[layer_idx]

    def keys(self, ids: Int64Array) -> Float32Array:
        """Return the keys of rows as stored, (Hkv, n, head_dim) float32."""
        first, stop = (int(ids.min()), int(ids.max()) + 1) if len(ids) else (0, 0)
        if stop - first <= _SPARSEST_SPAN * len(ids):  # read in order, and leave some out
            found = self._rows.span(self._layer_idx, first, stop).transpose(0, 1)
            if stop - first > len(ids) or np.any(np.diff(ids) != 1):
                found = found[:, torch.from_numpy(ids - first)]
        else:
            wanted = torch.from_numpy(ids).expand(self._layer.num_key_value_heads, -1)
            found = self._rows.gather(self._layer_idx, wanted)
        keys: npt.NDArray[np.float32] = found[..., : self._layer.head_dim].float().numpy()
        return keys

    def queries(self) -> Float32Array:
        """Return sampled queries, (Hkv, s, G, head_dim) float32."""
        found: Float32Array = self._backend.sampled_queries(self._layer_idx).numpy()
        return found
