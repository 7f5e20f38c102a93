"""`memory_type="vector_db"`: rows in mapped files, one FAISS index for each (layer, KV head).

FAISS answers with positions; `IndexSet.ids[position]` is the row, and keys and values come from our
own mapped rows. Which rows are indexed, and how indexes are made, read and written, is
`index_set.py`'s. Where only some heads are searched, only those need files; an index of any other
is made in RAM. How many lists of a plain IVF index are searched was calibrated for each head on
real queries. With a GPU, layers that fit are searched and read there, from copies: see `gpu.py`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import numpy as np

from memory_backends.base import MemoryBackend, Sinks
from memory_backends.errors import MemoryMismatchError
from memory_backends.layout import Int64Array, MemoryLayout
from memory_backends.row_files import RowFiles
from memory_backends.rows import loaded, take_heads
from memory_backends.scope import Scope
from memory_backends.scores import Precision, Retrieval, SearchResult
from memory_backends.validation import check_search
from memory_backends.vector_db import index as faiss_index
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
from memory_backends.vector_db.head_index import LayerIndexes
from memory_backends.vector_db.index import Float32Array
from memory_backends.vector_db.index_set import IndexSet
from memory_backends.vector_db.residency import ResidentLimit
from memory_backends.vector_db.search_parameters import SearchParameters
from memory_backends.vector_db.selection import Selection, is_small

# Of `cache_bytes`, what the keys of scopes may take at most.
_SCOPED_SHARE = 8


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
        self._limit: ResidentLimit | None = None
        self._parameters = SearchParameters(recall)
        self._gpu_layers = None if gpu is None else GPULayers(gpu)
        super().__init__(layout, path=path, identity=identity, sinks=sinks, row_codec=row_codec)
        self._indexes = IndexSet(
            self._store,
            self._searchable_rows(),
            option=index,
            cache_bytes=cache_bytes,
            use_files=index_files,
            parameters=self._parameters,
            copies=self._gpu_layers,
        )
        if cache_bytes is not None:
            self._scopes.num_bytes = min(self._scopes.num_bytes, cache_bytes // _SCOPED_SHARE)
            in_ram = self._indexes.bytes_in_ram
            self._limit = ResidentLimit(cache_bytes - in_ram, self._mapped_memory)

    def save(self, path: Path | str | None = None) -> None:
        """Bring the FAISS files up to date; with a path, those of a copy of the memory there.

        Raises:
            StoreError: the store or the copy cannot be written; the store serves as before.
        """
        super().save(path)
        target = self._copy_target(path)
        if target is None:
            if self.is_read_only and self._is_written():
                return
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
            self._indexes.start_anew()
            self._indexes.plan(self._searchable_rows())
            self._write_indexes()

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

    def close(self) -> None:
        """Let go of files and of the GPU's memory; the object is of no use afterwards."""
        if self._gpu_layers is not None:
            self._gpu_layers.clear()
        super().close()

    @property
    def lacks_files(self) -> bool:
        """Whether the store has FAISS files, but not of all heads that are to have them."""
        cache = self._indexes.cache
        return cache is not None and not cache.covers(self._indexed_heads)

    @property
    def factory(self) -> str:
        """The factory string that the indexes are built with now."""
        return self._indexes.factory

    @property
    def efforts(self) -> dict[int, list[Effort | None]]:
        """What each KV head's search finds by calibration, by layer.

        None where it was not calibrated, or is not to be indexed.
        """
        chosen: dict[int, list[Effort | None]] = {}
        for layer_idx, heads in self._indexed_heads.items():
            chosen[layer_idx] = [None] * self._layer(layer_idx).num_key_value_heads
            efforts = self._indexes.of_layer(layer_idx, heads).efforts
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
        found = self._indexes.of_layer(layer_idx)
        parameters = self._parameters.of(layer_idx, found, self._indexes.bitmap)
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
        places = self._indexes.rows_at(positions, layer_idx) * num_heads  # (Hkv, N, k)
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
        selection = self._parameters.selection(
            scope,
            lambda: Selection(self._rows_in(scope), self._indexes.ids, self._rows.num_rows),
        )
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
        found = self._indexes.of_layer(layer_idx, heads)
        parameters = self._parameters.of(
            layer_idx,
            found,
            self._indexes.bitmap,
            selection=selection,
            is_thorough=heads is not None,
        )
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
        return scores, np.where(positions < 0, -1, self._indexes.rows_at(positions, layer_idx))

    def _take(self, layer_idx: int, places: Int64Array) -> torch.Tensor:
        """Return heads' rows by place, from the GPU if the layer is there."""
        on_gpu = None if self._gpu_layers is None else self._gpu_layers.get(layer_idx)
        if on_gpu is None:
            return self._rows.take(layer_idx, torch.from_numpy(places))
        return take_heads(on_gpu.rows, torch.from_numpy(places).to(on_gpu.rows.device))

    def _on_gpu(self, layer_idx: int, found: LayerIndexes, k: int) -> GPULayer | None:
        """Return the layer's copy on the GPU; None if this search has to be on the CPU."""
        assert self._gpu_layers is not None  # the caller has looked
        if self._indexes.bitmap is not None or not can_select(k):
            return None
        num_rows, num_indexed = self._rows.num_rows, len(self._indexes.ids)

        def sizes() -> dict[int, int]:
            return {
                idx: bytes_on_gpu(
                    self._layer(idx), self.layout.dtype, num_rows, num_indexed, self.factory
                )
                for idx in self._indexed_heads
            }

        def rows(device: torch.device) -> torch.Tensor:
            return loaded(self._rows, self.layout, layer_idx, device)

        parameters = self._parameters.of(layer_idx, found, self._indexes.bitmap)
        return self._gpu_layers.moved(layer_idx, found.heads, parameters, rows, sizes)

    def _mapped_memory(self) -> Iterator[tuple[int, int]]:
        """Yield address and bytes of everything that is mapped from the store's files now."""
        if isinstance(self._rows, RowFiles):
            for layer_idx in self.layout.layers:
                records = self._rows.files[layer_idx].records
                yield records.data_ptr(), records.nbytes
        yield from self._indexes.mapped_memory()

    @property
    def _precision(self) -> Precision:
        return faiss_index.precision_of(self._indexes.factory)

    def _rows_changed(self) -> None:
        super()._rows_changed()
        self._indexes.plan(self._searchable_rows())

    def _is_written(self) -> bool:
        return self._indexes.is_written(self._searchable_rows(), self._indexed_heads)

    def _write_indexes(self) -> None:
        self._indexes.write(self._searchable_rows(), self._indexed_heads)
