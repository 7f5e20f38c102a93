"""The FAISS indexes over one store: which rows they hold, and how they come to be.

An index is made, read from the store's FAISS files, or grown, when its layer is first searched.
The files are a cache: what is written after them is added in RAM, and `IndexSet.write` makes them
anew. Removed rows stay in the indexes, unselected, until then.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memory_backends.errors import StoreError
from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.building import StoredLayer, add_rows, calibrate
from memory_backends.faiss.calibration import Effort
from memory_backends.faiss.coverage import IndexedHeads
from memory_backends.faiss.generation import Generation, write_generation
from memory_backends.faiss.gpu import GPULayers
from memory_backends.faiss.options import FaissOptions
from memory_backends.faiss.search_parameters import LayerIndexes, SearchParameters
from memory_backends.layout import Heads, Int64Array
from memory_backends.search.searchable import SearchableRows

_GROWTH = 1.2  # times the rows that it was calibrated on, and an index is calibrated again


class HeadIndex(NamedTuple):
    """One (layer, KV head)'s FAISS index, with the rows at the first `num_rows` positions."""

    num_rows: int
    index: Any
    efforts: list[Effort]  # what calibration found; empty if nothing

    @property
    def is_mapped(self) -> bool:
        """Whether the inverted lists are in the store's file."""
        return faiss_index.mapped_lists(self.index) is not None


class IndexSet:
    """The indexes of a store's (layer, KV head) pairs, all with the same rows in the same order.

    Any number of threads may call `of_layer` and `rows_at` at a time. One of them makes, reads or
    grows what is missing; the others go on if they have what they need, and wait for it if not.
    `plan`, `start_anew` and `write` change which row a position is: they are for the thread that
    writes to the store or refreshes it, while no other searches. A thread that makes indexes asks
    the catalogue, so none may call `of_layer` from within a snapshot.

    `parameters`, and `copies` of layers on a GPU, are forgotten here when an index or the row at a
    position is another.

    Attributes:
        ids: (positions,) the row at each position, of every index.
        bitmap: little-endian over positions, of the rows that may be found; None for all of them.
        factory: the FAISS factory string that indexes are made with now.
        generation: the FAISS files that are read; None if there are none to use.
        made: (layer, KV head) -> its index, of those that are ready. Some may lack the last rows.
    """

    def __init__(
        self,
        rows: SearchableRows,
        options: FaissOptions,
        parameters: SearchParameters,
        copies: GPULayers | None,
    ) -> None:
        self._rows = rows
        self._store = rows.store
        self._option = options.index
        self._cache_bytes = options.cache_bytes
        self._parameters = parameters
        self._copies = copies
        self._building = threading.Lock()
        self.made: dict[tuple[int, int], HeadIndex] = {}
        self.bitmap: npt.NDArray[np.uint8] | None = None
        self.generation: Generation | None = None
        self.ids: Int64Array = np.empty(0, dtype=np.int64)
        if options.index_files:
            self._read_files()
        self.factory = "" if self.generation is None else self.generation.factory
        self.plan()

    def plan(self) -> None:
        """Line up the indexes with the rows that a search may find."""
        searchable, factory = self._rows.ids, self._factory_for_rows()
        if self.factory in ("", "Flat") and factory != self.factory:
            self.start_anew(factory)  # the first build, or one grown out of "Flat"
        missing = np.setdiff1d(searchable, self.ids, assume_unique=True)
        self.ids = np.concatenate([self.ids, missing])
        unselected = len(searchable) < len(self.ids)
        selected = np.isin(self.ids, searchable, assume_unique=True) if unselected else None
        self.bitmap = None if selected is None else np.packbits(selected, bitorder="little")
        self._parameters.clear()
        if self._copies is not None:
            self._copies.clear()

    def start_anew(self, factory: str = "") -> None:
        """Forget all indexes and the files; `plan` then says which rows new ones have.

        New ones are made with `factory`, or with what `plan` chooses if it is "".
        """
        self.factory = factory
        self.generation = None
        self.ids = self.ids[:0]
        self.made.clear()

    def rows_at(self, positions: Int64Array, layer_idx: int) -> Int64Array:
        """Return the row of each FAISS position, any for -1; raise a StoreError for others."""
        try:
            return self.ids[positions]
        except IndexError:
            raise StoreError(
                f"the FAISS files of layer {layer_idx} are damaged: they name rows up to "
                f"{positions.max()}; expected less than {len(self.ids)}. Run `emt rebuild`."
            ) from None

    def _factory_for_rows(self) -> str:
        dim = self._store.layout.largest_head_dim
        return faiss_index.factory_for(self._option, len(self._rows), dim)

    def _read_files(self) -> None:
        """Use the FAISS files, if they can be used, and the rows that they hold."""
        catalog, num_rows = self._store.catalog, self._store.rows.num_rows
        before = catalog.setting("index")
        try:
            current = Generation.current(self._directory, catalog) if before else None
            if current is not None and self._option in ("auto", current.option):
                self.ids = current.read_ids(num_rows)
                self.generation = current
        except StoreError:
            # Unless another process has written meanwhile; then the rows are enough.
            if catalog.setting("index") == before and catalog.setting("num_rows") == num_rows:
                raise

    @property
    def bytes_in_ram(self) -> int:
        """Bytes of the FAISS files that are read whole, once all of them are."""
        files = self.generation
        return 0 if files is None or self._stay_mapped(files) else files.num_bytes

    def mapped_memory(self) -> Iterator[tuple[int, int]]:
        """Yield address and bytes of all inverted lists that are mapped from files now."""
        for made in list(self.made.values()):
            lists = faiss_index.mapped_lists(made.index)
            if lists is not None:
                yield int(lists.ptr), lists.totsize

    def is_written(self, wanted: IndexedHeads) -> bool:
        """Tell whether the store's FAISS files of some heads are up to date."""
        return (
            self.generation is not None
            and self.bitmap is None
            and self.factory == self._factory_for_rows()
            and self.generation.num_rows == len(self.ids)
            and self.generation.covers(wanted)  # more is no harm, and not made again
            and self.generation.is_in_force(self._store.catalog)
        )

    def write(self, wanted: IndexedHeads) -> None:
        """Write FAISS files of some heads to a new generation, unless those in force will do."""
        if self.generation is not None and self.is_written(wanted):
            self.generation.remove_others()
            return
        factory = self._factory_for_rows()
        # Drop removed rows for good; make more lists when the memory has outgrown those it has.
        if self.bitmap is not None or factory != self.factory:
            self.start_anew(factory)
            self.plan()
        self.generation = write_generation(
            self._directory,
            self._store.catalog,
            self.ids,
            {idx: functools.partial(self._to_write, idx, wanted[idx]) for idx in wanted},
            option=self._option,
            factory=self.factory,
            recall=self._parameters.recall,
        )

    def _to_write(
        self, layer_idx: int, heads: Sequence[int]
    ) -> dict[int, tuple[Any, list[Effort]]]:
        """Return one layer's indexes in RAM, complete, each with its calibrated efforts."""
        in_use = [head for head in heads if (layer_idx, head) in self.made]
        self.of_layer(layer_idx, heads)
        complete = {head: self.made[layer_idx, head] for head in heads}
        for head in set(heads) - set(in_use):  # built to be written: one layer at a time in RAM
            del self.made[layer_idx, head]
        # FAISS would write a reference to the file that the lists of these are in.
        mapped = [head for head in heads if complete[head].is_mapped]
        complete |= self._with_all_rows(layer_idx, self._begun(layer_idx, mapped, in_ram=True))
        return {head: (each.index, each.efforts) for head, each in complete.items()}

    def of_layer(self, layer_idx: int, heads: Heads = None) -> LayerIndexes:
        """Return the indexes of some KV heads, or of all, with all of `ids` in them."""
        if heads is None:
            heads = range(self._store.layout.layers[layer_idx].num_key_value_heads)
        num_rows = len(self.ids)
        ready = [self.made.get((layer_idx, head)) for head in heads]
        if any(each is None or each.num_rows < num_rows for each in ready):
            with self._building:
                complete = self._complete(layer_idx, heads)
            ready = [complete[head] for head in heads]
        return LayerIndexes(
            heads,
            [each.index for each in ready if each is not None],
            [each.efforts for each in ready if each is not None],
        )

    def _complete(self, layer_idx: int, heads: Sequence[int]) -> dict[int, HeadIndex]:
        """Make, read or extend the indexes of some heads, those that no other thread has by now."""
        complete, begun, missing = {}, {}, []
        for head in heads:
            made = self.made.get((layer_idx, head))
            if made is None:
                missing.append(head)
            elif made.num_rows >= len(self.ids):
                complete[head] = made
            else:
                begun[head] = made
                del self.made[layer_idx, head]  # gone if an error leaves it with some rows
        begun |= self._begun(layer_idx, missing)
        for head, made in self._with_all_rows(layer_idx, begun).items():
            complete[head] = self.made[layer_idx, head] = made
            self._parameters.forget(layer_idx, head)
        return complete

    def _begun(
        self, layer_idx: int, heads: Iterable[int], *, in_ram: bool = False
    ) -> dict[int, HeadIndex]:
        """Read the FAISS files of some heads; those without one get an empty index."""
        head_dim, files = self._store.layout.layers[layer_idx].head_dim, self.generation
        begun = {}
        if files is not None:
            mapped = self._stay_mapped(files) and not in_ram
            try:
                begun = {
                    head: HeadIndex(
                        files.num_rows,
                        files.read_head(layer_idx, head, head_dim, mapped=mapped),
                        files.efforts_of(layer_idx, head),
                    )
                    for head in heads
                    if files.holds(layer_idx, head)
                }
            except StoreError:
                if files.is_in_force(self._store.catalog):
                    raise
                # Another process has saved since and removed these files; the rows are there.
        for head in heads:
            if head not in begun:
                empty = faiss_index.new_index(self.factory, head_dim)
                begun[head] = HeadIndex(0, empty, [])
        return begun

    def _with_all_rows(
        self, layer_idx: int, begun: Mapping[int, HeadIndex]
    ) -> dict[int, HeadIndex]:
        """Add to heads' indexes the rows of `ids` that they lack, and calibrate new ones."""
        num_rows = len(self.ids)
        grow = [head for head, each in begun.items() if each.is_mapped and each.num_rows < num_rows]
        # Those from files cannot grow.
        begun = {**begun, **self._begun(layer_idx, grow, in_ram=True)}
        complete: dict[int, HeadIndex] = {}
        for present in {each.num_rows for each in begun.values()}:  # those read the same rows
            heads = [head for head, each in begun.items() if each.num_rows == present]
            indexes = [begun[head].index for head in heads]
            efforts = [begun[head].efforts for head in heads]
            rows = StoredLayer(self._store, layer_idx, heads)
            add_rows(indexes, rows, present, self.ids)
            if num_rows and (num_rows > _GROWTH * present or not all(efforts)):
                is_sink = np.isin(self.ids, self._store.catalog.sink_rows())
                efforts = calibrate(indexes, rows, self.ids, is_sink)
            for head, index, effort in zip(heads, indexes, efforts, strict=True):
                complete[head] = HeadIndex(num_rows, index, effort)
        return complete

    def _stay_mapped(self, files: Generation) -> bool:
        """Tell whether FAISS files stay on the disk: where they would take half of the bytes."""
        return self._cache_bytes is not None and 2 * files.num_bytes > self._cache_bytes

    @property
    def _directory(self) -> Path:
        assert self._store.path is not None  # the backend gives every store one
        return self._store.path
