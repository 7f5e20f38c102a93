"""`memory_type="vector_db"`: rows in mapped files, one FAISS index for each (layer, KV head).

FAISS answers with positions; `ids[position]` is the row, and keys and values come from our own
mapped rows. All indexes hold the same rows in the same order, so one array of ids serves them all.
The FAISS files are a cache: what is written after them is added in RAM when a layer is first
searched, and they are made anew by `save`. Removed rows stay in the index, unselected, until then.
Where only some heads are searched, only those need files; an index of any other is made in RAM.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from memory_backends.vector_db.coverage import all_heads, checked
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
# Share of an IVF index's lists that a search of named heads looks into, at least. Those are few and
# ask what no stored token has asked, so the calibration, on stored tokens' queries, is too hopeful:
# it lost passages of questions over 256,000 rows, as a sixteenth of the lists did. An eighth found
# what the exact search does (benchmarks/quality.md).
_THOROUGH = 1 / 8


class _HeadIndex(NamedTuple):
    """One (layer, KV head)'s FAISS index, with the first `num_rows` of the backend's `_ids`."""

    num_rows: int
    index: Any
    efforts: list[Effort]  # what calibration found; empty if nothing

    @property
    def is_mapped(self) -> bool:
        """Whether the inverted lists are in the store's file."""
        return faiss_index.mapped_lists(self.index) is not None


class _LayerIndexes(NamedTuple):
    """The indexes of the KV heads that are searched in one layer, all with the same rows."""

    numbers: Sequence[int]  # which heads they are
    heads: list[Any]
    efforts: list[list[Effort]]


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
        indexed_heads: layer -> the KV heads that `save` writes FAISS files for, in place of all
            heads of `indexed_layers`. Files that other heads have stay until there is something to
            write. Again, others can be searched too.
        device: a GPU, such as "cuda:0", for copies of as many indexed layers as fit; None or "cpu"
            for none.

    Raises:
        IndexFactoryError: FAISS rejects `index`, or it cannot serve a memory; with a GPU, the
            installed FAISS has no GPU support, or none for such an index.
        MemoryMismatchError: `indexed_layers` or `indexed_heads` has a layer or head that the layout
            has not, or the machine has no such device; see also `MemoryBackend`.
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
        indexed_heads: Mapping[int, Sequence[int]] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        gpu = gpu_of(device)
        for dim in {layer.head_dim for layer in layout.layers.values()}:
            faiss_index.check_factory(index, dim)
            if gpu is not None:
                check_gpu_factory(index, dim)
        layers = sorted(layout.layers if indexed_layers is None else indexed_layers)
        if not set(layers) <= set(layout.layers):
            raise MemoryMismatchError(
                f"indexed_layers must be some of {sorted(layout.layers)}; got {layers}."
            )
        self._indexed_layers = layers
        self._indexed_heads = (
            all_heads(layout, layers) if indexed_heads is None else checked(layout, indexed_heads)
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
        self._indexes: dict[tuple[int, int], _HeadIndex] = {}  # of (layer, KV head)
        self._parameters: dict[tuple[int, int, bool], Any] = {}  # FAISS search parameters of each
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
            indexed_heads=self._indexed_heads,
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
        """What each KV head's search finds by calibration, by layer.

        None where it was not calibrated, or is not to be indexed.
        """
        chosen: dict[int, list[Effort | None]] = {}
        for layer_idx, heads in self._indexed_heads.items():
            chosen[layer_idx] = [None] * self._layer(layer_idx).num_key_value_heads
            efforts = self._layer_indexes(layer_idx, heads).efforts
            for head, found in zip(heads, efforts, strict=True):
                chosen[layer_idx][head] = least_effort(found, self._recall) if found else None
        return chosen

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
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Sequence[int] | None = None,
        scope: Scope | None = None,
    ) -> SearchResult:
        if self._precision != "half" or len(self) < k or scope is not None:
            return super()._search(layer_idx, queries, k, heads, scope)
        # FAISS ranks queries of any length alike, and nothing has to be ranked again.
        queries = queries.cpu()
        scores, ids = self._found(layer_idx, queries.numpy(), k, heads)
        lengths = torch.linalg.vector_norm(queries, dim=-1, keepdim=True)
        return SearchResult(
            torch.from_numpy(scores) / lengths.clamp(min=1e-12), torch.from_numpy(ids)
        )

    def _candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Sequence[int] | None
    ) -> SearchResult:
        scores, ids = self._found(layer_idx, unit_queries.cpu().numpy(), k, heads)
        return SearchResult(torch.from_numpy(scores), torch.from_numpy(ids))

    def _candidates_in(
        self,
        scope: Scope,
        layer_idx: int,
        unit_queries: torch.Tensor,
        k: int,
        heads: Sequence[int] | None,
    ) -> tuple[SearchResult, Precision]:
        if is_small(len(self._rows_in(scope))):
            return super()._candidates_in(scope, layer_idx, unit_queries, k, heads)
        unit_queries = unit_queries.cpu()
        selection = self._selection_of(scope)
        found = self._found(layer_idx, unit_queries.numpy(), k, heads, selection)
        scores, ids = (torch.from_numpy(part) for part in found)
        if len(selection.unindexed):
            keys = self._unit_keys_of(layer_idx, selection.unindexed, heads)
            more = unit_queries @ keys.transpose(1, 2)  # (h, N, m)
            others = torch.from_numpy(selection.unindexed).expand(more.shape)
            scores, order = torch.cat([scores, more], -1).sort(-1, descending=True)
            scores = scores[..., :k]
            ids = torch.cat([ids, others], -1).gather(-1, order[..., :k])
        short = (ids < 0).any(-1).any(0).nonzero().squeeze(1)
        if len(short):  # the lists that were searched have too few rows of the scope
            best = self._exact_in(scope, layer_idx, unit_queries[:, short], k, heads)
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

    def _unit_keys_of(
        self, layer_idx: int, rows: Int64Array, heads: Sequence[int] | None
    ) -> torch.Tensor:
        keys = super()._unit_keys_of(layer_idx, rows, heads)
        if self._limit is not None:
            self._limit.count(keys.shape[0] * keys.shape[1])
        return keys

    def _found(
        self,
        layer_idx: int,
        queries: Float32Array,
        k: int,
        heads: Sequence[int] | None,
        selection: Selection | None = None,
    ) -> tuple[Float32Array, Int64Array]:
        """Return inner products and row ids, each (h, N, k), for queries (h, N, head_dim)."""
        found = self._layer_indexes(layer_idx, heads)
        is_thorough = heads is not None
        parameters = self._parameters_of(layer_idx, found, selection, is_thorough=is_thorough)
        indexes = found.heads
        queries = np.ascontiguousarray(queries)
        num_heads, num_queries, _ = queries.shape
        scores = np.empty((num_heads, num_queries, k), dtype=np.float32)
        positions = np.empty((num_heads, num_queries, k), dtype=np.int64)
        if not k:
            return scores, positions
        # Copies on a GPU are of whole layers; a few heads are not worth one.
        may_be_copied = self._gpu_layers is not None and heads is None and selection is None
        on_gpu = self._on_gpu(layer_idx, found, k) if may_be_copied else None
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
                for idx in self._indexed_heads
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
        self,
        layer_idx: int,
        found: _LayerIndexes,
        selection: Selection | None = None,
        *,
        is_thorough: bool = False,
    ) -> list[Any]:
        """Return what each head's index is searched with; see `_THOROUGH` for `is_thorough`."""
        all_known = self._parameters if selection is None else selection.parameters
        bitmap = self._searchable_bitmap if selection is None else selection.bitmap
        wider = 1.0 if selection is None else selection.wider
        parameters = []
        for head, index, efforts in zip(*found, strict=True):
            known = all_known.get((layer_idx, head, is_thorough))
            if known is None:
                nprobe = least_effort(efforts, self._recall).nprobe if efforts else None
                if nprobe is not None and is_thorough:
                    nprobe = max(nprobe, round(_THOROUGH * index.nlist))
                known = faiss_index.search_parameters(index, bitmap, nprobe, wider)
                all_known[layer_idx, head, is_thorough] = known
            parameters.append(known)
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
            lists = faiss_index.mapped_lists(found.index)
            if lists is not None:
                yield int(lists.ptr), lists.totsize

    @property
    def _precision(self) -> Precision:
        return faiss_index.precision_of(self._factory)

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Choose which heads the next `save` writes FAISS files for.

        Args:
            heads: layer -> KV heads; None for all heads of `indexed_layers`.

        Raises:
            MemoryMismatchError: the layout has no such layer or head.
        """
        self._indexed_heads = (
            all_heads(self.layout, self._indexed_layers)
            if heads is None
            else checked(self.layout, heads)
        )

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

    def _layer_indexes(self, layer_idx: int, heads: Sequence[int] | None = None) -> _LayerIndexes:
        """Return the indexes of some KV heads, or of all, with all of `_ids` in them."""
        if heads is None:
            heads = range(self._layer(layer_idx).num_key_value_heads)
        num_rows = len(self._ids)
        ready = [self._indexes.get((layer_idx, head)) for head in heads]
        if any(found is None or found.num_rows < num_rows for found in ready):
            with self._building:
                complete = self._complete(layer_idx, heads)
            ready = [complete[head] for head in heads]
        return _LayerIndexes(
            heads,
            [found.index for found in ready if found is not None],
            [found.efforts for found in ready if found is not None],
        )

    def _complete(self, layer_idx: int, heads: Sequence[int]) -> dict[int, _HeadIndex]:
        """Make, read or extend the indexes of some heads, those that no other thread has by now."""
        known = {head: self._indexes.get((layer_idx, head)) for head in heads}
        complete, found = {}, {}
        for head, ready in known.items():
            if ready is not None and ready.num_rows >= len(self._ids):
                complete[head] = ready
            elif ready is not None:
                found[head] = ready
                del self._indexes[layer_idx, head]  # gone if an error leaves it with some rows
        new = [head for head, ready in known.items() if ready is None]
        found.update(self._first_indexes(layer_idx, new))
        for head, ready in self._with_all_rows(layer_idx, found).items():
            complete[head] = self._indexes[layer_idx, head] = ready
            for is_thorough in (False, True):
                self._parameters.pop((layer_idx, head, is_thorough), None)
            self._selections.clear()
        return complete

    def _first_indexes(
        self, layer_idx: int, heads: Iterable[int], *, in_ram: bool = False
    ) -> dict[int, _HeadIndex]:
        """Read the FAISS files of some heads; those without one get an empty index."""
        head_dim, cache = self._layer(layer_idx).head_dim, self._cache
        found = {}
        if cache is not None:
            mapped = self._are_mapped(cache) and not in_ram
            try:
                found = {
                    head: _HeadIndex(
                        cache.num_rows,
                        cache.read_head(layer_idx, head, head_dim, mapped=mapped),
                        cache.efforts_of(layer_idx, head),
                    )
                    for head in heads
                    if cache.holds(layer_idx, head)
                }
            except StoreError:
                if cache.is_in_force(self._catalog):
                    raise
                # Another process has saved since and removed these files; the rows are there.
        for head in heads:
            if head not in found:
                empty = faiss_index.new_index(self._factory, head_dim)
                found[head] = _HeadIndex(0, empty, [])
        return found

    def _with_all_rows(
        self, layer_idx: int, found: Mapping[int, _HeadIndex]
    ) -> dict[int, _HeadIndex]:
        """Add to heads' indexes what of `_ids` they lack, and calibrate them if they are new."""
        num_rows = len(self._ids)
        grow = [head for head, each in found.items() if each.is_mapped and each.num_rows < num_rows]
        # Those from files cannot grow.
        found = {**found, **self._first_indexes(layer_idx, grow, in_ram=True)}
        complete: dict[int, _HeadIndex] = {}
        for present in {each.num_rows for each in found.values()}:  # those read the same rows
            alike = {head: each for head, each in found.items() if each.num_rows == present}
            complete |= self._grown(layer_idx, alike, present)
        return complete

    def _grown(
        self, layer_idx: int, found: Mapping[int, _HeadIndex], present: int
    ) -> dict[int, _HeadIndex]:
        """Do what `_with_all_rows` does, to indexes with the first `present` of `_ids` in them."""
        rows = _LayerRows(self, layer_idx, list(found))
        indexes = [each.index for each in found.values()]
        efforts = [each.efforts for each in found.values()]
        add_rows(indexes, rows, present, self._ids)
        has_grown = len(self._ids) > _GROWTH * present
        if len(self._ids) and (has_grown or not all(efforts)):
            is_sink = np.isin(self._ids, self._catalog.sink_rows())
            efforts = calibrate(indexes, rows, self._ids, is_sink)
        return {
            head: _HeadIndex(len(self._ids), index, effort)
            for head, index, effort in zip(found, indexes, efforts, strict=True)
        }

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
            and self._cache.covers(self._indexed_heads)  # more is no harm, and not made again
            and self._cache.is_in_force(self._catalog)
        ):
            self._cache.remove_others()
            return  # up to date

        def built(layer_idx: int) -> dict[int, tuple[Any, list[Effort]]]:
            heads = self._indexed_heads[layer_idx]
            in_use = [head for head in heads if (layer_idx, head) in self._indexes]
            self._layer_indexes(layer_idx, heads)
            found = {head: self._indexes[layer_idx, head] for head in heads}
            for head in set(heads) - set(in_use):  # built to be written: one layer at a time in RAM
                del self._indexes[layer_idx, head]
            # FAISS would write a reference to the file that the lists of these are in.
            mapped = [head for head in heads if found[head].is_mapped]
            first = self._first_indexes(layer_idx, mapped, in_ram=True)
            found.update(self._with_all_rows(layer_idx, first))
            return {head: (each.index, each.efforts) for head, each in found.items()}

        self._cache = write_generation(
            self._directory,
            self._catalog,
            self._ids,
            {idx: functools.partial(built, idx) for idx in self._indexed_heads},
            option=self._index_option,
            factory=self._factory,
            recall=self._recall,
        )


class _LayerRows:
    """Keys and sampled queries of some of a layer's h KV heads, for building."""

    def __init__(self, backend: VectorDBBackend, layer_idx: int, heads: list[int]) -> None:
        self._backend = backend
        self._rows: RowStorage = backend._rows
        self._layer_idx = layer_idx
        self._layer = backend.layout.layers[layer_idx]
        is_all = heads == list(range(self._layer.num_key_value_heads))
        self._heads = None if is_all else heads  # None reads without copying
        self._num_heads = len(heads)

    def keys(self, ids: Int64Array) -> Float32Array:
        """Return the keys of rows as stored, (h, n, head_dim) float32."""
        first, stop = (int(ids.min()), int(ids.max()) + 1) if len(ids) else (0, 0)
        if stop - first <= _SPARSEST_SPAN * len(ids):  # read in order, and leave some out
            found = self._rows.span(self._layer_idx, first, stop, self._heads).transpose(0, 1)
            if stop - first > len(ids) or np.any(np.diff(ids) != 1):
                found = found[:, torch.from_numpy(ids - first)]
        else:
            wanted = torch.from_numpy(ids).expand(self._num_heads, -1)
            found = self._rows.gather(self._layer_idx, wanted, self._heads)
        keys: npt.NDArray[np.float32] = found[..., : self._layer.head_dim].float().numpy()
        return keys

    def queries(self) -> Float32Array:
        """Return sampled queries, (h, s, G, head_dim) float32."""
        found = self._backend.sampled_queries(self._layer_idx)
        chosen: Float32Array = (found if self._heads is None else found[self._heads]).numpy()
        return chosen
