"""FAISS's search parameters: how many lists to look into, and which rows may be found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.calibration import Effort, least_effort
from memory_backends.faiss.selection import Selection
from memory_backends.scope import Scope

_MAX_SELECTIONS = 64  # a bit a row each
# Lists of an IVF index that a search of named heads looks into, at least. Those are few and ask
# what no stored token has asked, so the calibration, on stored tokens' queries, is too hopeful:
# it loses passages that these find (benchmarks/quality.md).
_THOROUGH = 192


class LayerIndexes(NamedTuple):
    """The indexes of the KV heads that are searched in one layer, all with the same rows."""

    numbers: Sequence[int]  # which heads they are
    heads: list[Any]
    efforts: list[list[Effort]]


class SearchParameters:
    """FAISS search parameters, kept for as long as the indexes and their rows are the same.

    Searches of any number of threads may ask at a time: two that make the same parameters make
    equal ones. Whoever changes an index, or which rows may be found, says so with `forget` or
    `clear`, afterwards.

    `recall` is what the search of a calibrated index must find; see `calibration.py`.
    """

    def __init__(self, recall: float) -> None:
        self.recall = recall
        self._parameters: dict[tuple[int, int, bool], Any] = {}  # of (layer, head, is_thorough)
        self._selections: dict[Scope, Selection] = {}

    def of(
        self,
        layer_idx: int,
        indexes: LayerIndexes,
        bitmap: npt.NDArray[np.uint8] | None,
        *,
        selection: Selection | None = None,
        is_thorough: bool = False,
    ) -> list[Any]:
        """Return the search parameters of each head's index of a layer.

        They select the rows of `bitmap`, little-endian over positions, all rows if it is None, or
        in its place those of a scope's `selection`. With `is_thorough`, see `_THOROUGH`.
        """
        kept = self._parameters if selection is None else selection.parameters
        bitmap = bitmap if selection is None else selection.bitmap
        wider = 1.0 if selection is None else selection.wider
        parameters = []
        for head, index, efforts in zip(*indexes, strict=True):
            of_head = kept.get((layer_idx, head, is_thorough))
            if of_head is None:
                nprobe = least_effort(efforts, self.recall).nprobe if efforts else None
                if nprobe is not None and is_thorough:
                    nprobe = max(nprobe, min(_THOROUGH, index.nlist))
                of_head = faiss_index.search_parameters(index, bitmap, nprobe, wider)
                kept[layer_idx, head, is_thorough] = of_head
            parameters.append(of_head)
        return parameters

    def selection(self, scope: Scope, make: Callable[[], Selection]) -> Selection:
        """Return what the searches of a scope have in common, made by `make` if it is not kept."""
        selection = self._selections.get(scope)
        if selection is None:
            selection = make()
            if len(self._selections) >= _MAX_SELECTIONS:
                self._selections.clear()
            self._selections[scope] = selection
        return selection

    def forget(self, layer_idx: int, head: int) -> None:
        """Forget those of one index, which has changed."""
        for is_thorough in (False, True):
            self._parameters.pop((layer_idx, head, is_thorough), None)
        self._selections.clear()

    def clear(self) -> None:
        """Forget all: other rows may be found now, or are at other positions."""
        self._selections.clear()
        self._parameters.clear()  # last: a search meanwhile must not keep the old selection
