"""`memory_type="vector_db"`: one FAISS index for each (layer, KV head) over rows in mapped files.

FAISS answers with positions; `IndexSet.ids[position]` is the row, and keys and values come from the
store's mapped rows. `index_set.py` decides which rows are indexed, and makes, reads and writes the
indexes. Where only some heads are searched, only those need files; an index of any other head is
made in RAM. How many lists of a plain IVF index are searched was calibrated for each head on real
queries. With a GPU, layers that fit are searched and read there, from copies: see `gpu.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import numpy as np

from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.calibration import Effort, least_effort
from memory_backends.faiss.coverage import all_heads, checked
from memory_backends.faiss.gpu import GPULayer, GPULayers, can_select, check_gpu_factory, gpu_of
from memory_backends.faiss.index_set import IndexSet
from memory_backends.faiss.options import FaissOptions
from memory_backends.faiss.residency import ResidentLimit
from memory_backends.faiss.search_parameters import LayerIndexes, SearchParameters
from memory_backends.faiss.selection import Selection, is_small
from memory_backends.layout import Float32Array, Heads, Int64Array
from memory_backends.rows.base import take_heads
from memory_backends.rows.files import RowFiles
from memory_backends.scope import Scope
from memory_backends.search.scores import Precision, Retrieval, SearchResult
from memory_backends.search.searchable import SearchableRows
from memory_backends.search.searcher import Searcher

# Of `cache_bytes`, what the keys of scopes may take at most.
_SCOPED_SHARE = 8


class FaissSearcher(Searcher):
    """Search by FAISS, with FAISS files in the store.

    Raises:
        IndexFactoryError: FAISS rejects `index`, or it cannot serve a memory; with a GPU, the
            installed FAISS has no GPU support, or none for such an index.
        MemoryMismatchError: `indexed_layers` or `indexed_heads` has a layer or head that the layout
            has not, or the machine has no such device.
        StoreError: the store's FAISS files are damaged.
    """

    options_class = FaissOptions
    keeps_files = True

    def __init__(self, rows: SearchableRows, options: FaissOptions) -> None:
        super().__init__(rows, options)
        self.overfetch = options.overfetch
        gpu = gpu_of(options.device)
        for dim in {layer.head_dim for layer in self.layout.layers.values()}:
            faiss_index.check_factory(options.index, dim)
            if gpu is not None:
                check_gpu_factory(options.index, dim)
        self._all_heads = all_heads(self.layout, options.indexed_layers)
        self._indexed_heads = self._all_heads
        if options.indexed_heads is not None:
            self.index_heads(options.indexed_heads)
        self._parameters = SearchParameters(options.recall)
        self._gpu_layers = None if gpu is None else GPULayers(gpu, rows)
        self._indexes = IndexSet(rows, options, self._parameters, self._gpu_layers)
        self._limit: ResidentLimit | None = None
        if options.cache_bytes is not None:
            share = options.cache_bytes // _SCOPED_SHARE
            rows.scopes.num_bytes = min(rows.scopes.num_bytes, share)
            in_ram = self._indexes.bytes_in_ram
            self._limit = ResidentLimit(options.cache_bytes - in_ram, self._mapped_memory)

    # -- searching ------------------------------------------------------------------------------

    @property
    def precision(self) -> Precision:
        """What the index keeps of its vectors."""
        return faiss_index.precision_of(self._indexes.factory)

    def search(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> SearchResult:
        """Search; half-precision indexes without ranking anything again."""
        if self.precision != "half" or len(self.rows) < k or scope is not None:
            return super().search(layer_idx, queries, k, heads, scope)
        return self._search_half(layer_idx, queries, k, heads, is_thorough=heads is not None)

    def _search_half(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads,
        *,
        is_thorough: bool,
    ) -> SearchResult:
        queries = queries.detach().float().cpu()  # FAISS ranks queries of any length alike
        scores, ids = self._search_indexes(
            layer_idx, queries.numpy(), k, heads, is_thorough=is_thorough
        )
        lengths = torch.linalg.vector_norm(queries, dim=-1, keepdim=True)
        return SearchResult(
            torch.from_numpy(scores) / lengths.clamp(min=1e-12), torch.from_numpy(ids)
        )

    def retrieve(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> Retrieval:
        """Search, and take keys and values where they are, on the GPU or in the mapped files."""
        layer = self.layout.layers[layer_idx]
        if self.precision != "half" or len(self.rows) < k or scope is not None:
            scores, ids = self.search(layer_idx, queries, k, heads, scope)
        else:  # as `nearest` does
            scores, ids = self._search_half(layer_idx, queries, k, heads, is_thorough=False)
        if not len(self.rows):
            rows = torch.zeros(*ids.shape, layer.row_dim, dtype=self.layout.dtype)
        else:
            rows = self._take(layer_idx, np.maximum(ids.numpy(), 0), heads)
        return Retrieval(scores, ids, rows[..., : layer.head_dim], rows[..., layer.head_dim :])

    def nearest(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        k: int,
        heads: Heads = None,
        scope: Scope | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return keys and values; a decode step waits for this, so it does no more than it must."""
        if self.precision != "half" or scope is not None:
            return super().nearest(layer_idx, queries, k, heads, scope)
        layer_indexes = self._indexes.of_layer(layer_idx, heads)
        parameters = self._parameters.of(layer_idx, layer_indexes, self._indexes.bitmap)
        wanted = queries.detach().to("cpu", torch.float32).contiguous().numpy()
        on_gpu = self._on_gpu(layer_idx, layer_indexes, k) if heads is None else None
        if on_gpu is not None:
            positions = on_gpu.search(wanted, k)[1]
        else:
            positions = np.empty((*wanted.shape[:2], k), dtype=np.int64)
            for head, index in enumerate(layer_indexes.heads):
                positions[head] = faiss_index.search_positions(
                    index, wanted[head], k, parameters[head]
                )
        if positions.min() < 0:
            return None
        rows = self._take(layer_idx, self._indexes.rows_at(positions, layer_idx), heads)
        head_dim = self.layout.layers[layer_idx].head_dim
        return rows[..., :head_dim], rows[..., head_dim:]

    def candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Heads
    ) -> SearchResult:
        """Search the indexes."""
        scores, ids = self._search_indexes(
            layer_idx, unit_queries.cpu().numpy(), k, heads, is_thorough=heads is not None
        )
        return SearchResult(torch.from_numpy(scores), torch.from_numpy(ids))

    def candidates_in(
        self, scope: Scope, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Heads
    ) -> tuple[SearchResult, Precision]:
        """Search the indexes for a scope's rows; compare queries with each row of a small one."""
        if is_small(self.rows.count(scope)):
            return super().candidates_in(scope, layer_idx, unit_queries, k, heads)
        unit_queries = unit_queries.cpu()
        selection = self._parameters.selection(
            scope,
            lambda: Selection(
                self.rows.ids_in(scope), self._indexes.ids, self.rows.stored.num_rows
            ),
        )
        hits = self._search_indexes(
            layer_idx,
            unit_queries.numpy(),
            k,
            heads,
            is_thorough=heads is not None,
            selection=selection,
        )
        scores, ids = (torch.from_numpy(part) for part in hits)
        if len(selection.unindexed):
            keys = self.unit_keys_of(layer_idx, selection.unindexed, heads)
            more = unit_queries @ keys.transpose(1, 2)  # (h, N, m)
            others = torch.from_numpy(selection.unindexed).expand(more.shape)
            scores, order = torch.cat([scores, more], -1).sort(-1, descending=True)
            scores = scores[..., :k]
            ids = torch.cat([ids, others], -1).gather(-1, order[..., :k])
        short = (ids < 0).any(-1).any(0).nonzero().squeeze(1)
        if len(short):  # the lists that were searched have too few rows of the scope
            best = self.compare_all(scope, layer_idx, unit_queries[:, short], k, heads)
            scores[:, short], ids[:, short] = best.scores, best.ids
        return SearchResult(scores, ids), self.precision

    def unit_keys_of(self, layer_idx: int, rows: Int64Array, heads: Heads) -> torch.Tensor:
        """Return keys of unit length, and count them as read."""
        keys = super().unit_keys_of(layer_idx, rows, heads)
        if self._limit is not None:
            self._limit.count(keys.shape[0] * keys.shape[1])
        return keys

    def _search_indexes(
        self,
        layer_idx: int,
        queries: Float32Array,
        k: int,
        heads: Heads,
        *,
        is_thorough: bool,
        selection: Selection | None = None,
    ) -> tuple[Float32Array, Int64Array]:
        """Return inner products and row ids, each (h, N, k), for queries (h, N, head_dim)."""
        layer_indexes = self._indexes.of_layer(layer_idx, heads)
        parameters = self._parameters.of(
            layer_idx,
            layer_indexes,
            self._indexes.bitmap,
            selection=selection,
            is_thorough=is_thorough,
        )
        queries = np.ascontiguousarray(queries)
        # Copies on a GPU are of whole layers; a few heads are not worth one.
        is_whole = k > 0 and heads is None and selection is None
        on_gpu = self._on_gpu(layer_idx, layer_indexes, k) if is_whole else None
        if on_gpu is not None:
            scores, positions = on_gpu.search(queries, k)
        else:
            scores, positions = faiss_index.search_heads(
                layer_indexes.heads, queries, k, parameters
            )
        return scores, np.where(positions < 0, -1, self._indexes.rows_at(positions, layer_idx))

    def _take(self, layer_idx: int, ids: Int64Array, heads: Heads) -> torch.Tensor:
        """Return rows by id, (h, N, k) to (h, N, k, R), from the GPU if the layer is there."""
        if self._limit is not None:
            self._limit.count(ids.size)
        if heads is not None:
            return self.rows.stored.gather(layer_idx, torch.from_numpy(ids), heads)
        num_heads = len(ids)
        places = ids * num_heads
        places += np.arange(num_heads).reshape(-1, 1, 1)
        on_gpu = None if self._gpu_layers is None else self._gpu_layers.get(layer_idx)
        if on_gpu is None:
            rows = self.rows.stored.take(layer_idx, torch.from_numpy(places))
        else:
            rows = take_heads(on_gpu.rows, torch.from_numpy(places).to(on_gpu.rows.device))
        return rows

    def _on_gpu(self, layer_idx: int, layer_indexes: LayerIndexes, k: int) -> GPULayer | None:
        """Return the layer's copy on the GPU; None if this search has to be on the CPU."""
        if self._gpu_layers is None or self._indexes.bitmap is not None or not can_select(k):
            return None
        return self._gpu_layers.moved(
            layer_idx,
            layer_indexes,
            self._parameters.of(layer_idx, layer_indexes, None),
            factory=self.factory,
            num_indexed=len(self._indexes.ids),
            may_move=self._indexed_heads,
        )

    def _mapped_memory(self) -> Iterator[tuple[int, int]]:
        """Yield address and bytes of everything that is mapped from the store's files now."""
        stored = self.rows.stored
        if isinstance(stored, RowFiles):
            for layer_idx in self.layout.layers:
                records = stored.files[layer_idx].records
                yield records.data_ptr(), records.nbytes
        yield from self._indexes.mapped_memory()

    # -- keeping up with the store --------------------------------------------------------------

    def rows_changed(self) -> None:
        """Line up the indexes with the rows that may be found now."""
        self._indexes.plan()

    def close(self) -> None:
        """Let go of the GPU's memory."""
        if self._gpu_layers is not None:
            self._gpu_layers.clear()

    # -- files ----------------------------------------------------------------------------------

    def index_heads(self, heads: Mapping[int, Sequence[int]] | None) -> None:
        """Choose the heads that get files; None for all heads of `indexed_layers`."""
        self._indexed_heads = self._all_heads if heads is None else checked(self.layout, heads)

    @property
    def lacks_files(self) -> bool:
        """Whether the store has FAISS files, but not of all heads that are to have them."""
        generation = self._indexes.generation
        return generation is not None and not generation.covers(self._indexed_heads)

    @property
    def has_written(self) -> bool:
        """Whether the FAISS files are up to date."""
        return self._indexes.is_written(self._indexed_heads)

    def write_files(self) -> None:
        """Bring the FAISS files up to date."""
        self._indexes.write(self._indexed_heads)

    def rebuild_files(self) -> None:
        """Make the FAISS files anew from the rows."""
        self._indexes.start_anew()
        self._indexes.plan()
        self.write_files()

    def options_of_copy(self) -> FaissOptions:
        """Return options for the same files, without a limit or a GPU."""
        options: FaissOptions = self.options
        return FaissOptions(
            index=options.index, recall=options.recall, indexed_heads=self._indexed_heads
        )

    # -- what the indexes are -------------------------------------------------------------------

    @property
    def factory(self) -> str:
        """The factory string that the indexes are built with now."""
        return self._indexes.factory

    @property
    def searches_exactly(self) -> bool:
        """Whether the indexes are flat."""
        return self.factory == "Flat"

    @property
    def efforts(self) -> dict[int, list[Effort | None]]:
        """Layer -> each KV head's calibrated effort; None without one, or if it is not indexed."""
        chosen: dict[int, list[Effort | None]] = {}
        for layer_idx, heads in self._indexed_heads.items():
            chosen[layer_idx] = [None] * self.layout.layers[layer_idx].num_key_value_heads
            efforts = self._indexes.of_layer(layer_idx, heads).efforts
            for head, calibrated in zip(heads, efforts, strict=True):
                if calibrated:
                    effort = least_effort(calibrated, self._parameters.recall)
                    chosen[layer_idx][head] = effort
        return chosen
