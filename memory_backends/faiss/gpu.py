"""Copies of layers on a GPU: FAISS's GPU indexes, and rows as tensors, for as many layers as fit.

The indexes in RAM and the rows in files stay what they are: what is on the GPU is copied from them
when a layer is first searched, and forgotten when the set of rows changes. Results are the same,
but for the rounding of float32. Facts read in FAISS's source and documentation:

* A GPU index takes `nprobe` with each call, but not every selector: a search that has to leave
  removed rows out is the CPU's, until `save` or `rebuild` has dropped them from the index.
* `k` and `nprobe` must be below 2048; older versions refuse 2048 itself.
* GPU indexes that share `StandardGpuResources` must not be searched by two threads at a time.
* Flat and IVF with flat or scalar-quantised codes have a GPU index; HNSW has none.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import faiss

from memory_backends.errors import IndexFactoryError, MemoryMismatchError
from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.lists import has_own_lists
from memory_backends.faiss.search_parameters import LayerIndexes
from memory_backends.layout import Float32Array, Int64Array, LayerLayout
from memory_backends.rows.base import loaded
from memory_backends.search.checks import usable_device
from memory_backends.search.searchable import SearchableRows

RESERVE = 0.25  # of the free bytes: for the model's cache of the context and its activations
_SCRATCH_BYTES = 2**28  # FAISS would take up to 1.5 GiB
_SELECTION_LIMIT = 2048
_ROWS_PADDED = 32  # of a list
_CODES = (faiss.ScalarQuantizer.QT_fp16, faiss.ScalarQuantizer.QT_8bit)
_OUT_OF_MEMORY = re.compile("out of memory|alloc fail", re.IGNORECASE)  # torch's words, and FAISS's


class GPU:
    """One GPU, a CUDA `device` with an index, as torch and FAISS see it.

    `searching` is held by the one thread that may use FAISS's resources.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.searching = threading.Lock()
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_SCRATCH_BYTES)

    def free_bytes(self) -> int:
        """Return how much can be allocated: what the driver has, and what torch keeps unused."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free + kept)

    def to_gpu(self, index: Any) -> Any:
        """Return a copy of a FAISS index; a RuntimeError says that there is no room for it."""
        options = faiss.GpuClonerOptions()
        options.useFloat16 = False  # of the kinds taken it would only round Flat, which is exact
        options.use_cuvs = False  # it has not all of them
        return faiss.index_cpu_to_gpu(self._resources, self.device.index, index, options)


def gpu_of(device: torch.device | str | None) -> GPU | None:
    """Return the GPU that `memory_device` names; None if it is the CPU.

    Raises:
        IndexFactoryError: the installed FAISS has no GPU support.
        MemoryMismatchError: torch or FAISS sees no such device, or it is none that FAISS can use.
    """
    device = device or "cpu"
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return None
    if kind != "cuda":
        raise MemoryMismatchError(
            f"memory_device of a vector_db must be 'cpu' or a CUDA device such as 'cuda:0'; "
            f"got '{device}'. Set memory_device: null, or memory_type: manual."
        )
    if not hasattr(faiss, "StandardGpuResources"):
        raise IndexFactoryError(
            f"memory_device '{device}' needs FAISS with GPU support; the installed faiss "
            f"{faiss.__version__} has none. `pip install 'emt[gpu]'`, or set memory_device: null."
        )
    usable = usable_device(device)
    if usable.index is None:
        usable = torch.device(usable.type, torch.cuda.current_device())
    if usable.index >= faiss.get_num_gpus():
        raise MemoryMismatchError(
            f"memory_device must be a GPU that FAISS sees; got '{device}', and it sees "
            f"{faiss.get_num_gpus()}. Update the driver, or set memory_device: null."
        )
    return GPU(usable)


def check_gpu_factory(factory: str, dim: int) -> None:
    """Raise an IndexFactoryError for an index that FAISS does not search on a GPU as on the CPU."""
    if factory == "auto":
        return
    index = faiss_index.new_index(factory, dim)
    if isinstance(index, faiss.IndexFlat):
        return
    is_coded = isinstance(index, faiss.IndexIVFScalarQuantizer)
    if not has_own_lists(index) or (is_coded and index.sq.qtype not in _CODES):
        raise IndexFactoryError(
            "with a GPU as memory_device, index must be 'auto', 'Flat' or of the families "
            f"'IVF1024,Flat', 'IVF1024,SQfp16' and 'IVF1024,SQ8'; got {factory!r}. "
            "Use one of these, or set memory_device: null."
        )


def layers_that_fit(
    bytes_per_layer: Mapping[int, int], free_bytes: int, reserve: float = RESERVE
) -> list[int]:
    """Choose the layers to copy to a GPU, of which a `reserve` share is left to the model.

    Every layer is searched once a token, but deep layers' queries are spread more, so their
    searches look into more lists for the same recall: they gain most and come first. A layer too
    big for what is left is passed over for shallower ones.
    """
    left = int(free_bytes * (1 - reserve))
    chosen = []
    for layer_idx in sorted(bytes_per_layer, reverse=True):
        if bytes_per_layer[layer_idx] <= left:
            left -= bytes_per_layer[layer_idx]
            chosen.append(layer_idx)
    return sorted(chosen)


def bytes_on_gpu(
    layer: LayerLayout, dtype: torch.dtype, num_rows: int, num_indexed: int, factory: str
) -> int:
    """Return at most how many bytes a layer's copy takes: its rows, and an index for each KV head.

    `num_rows` are stored, `num_indexed` of them are in the indexes, which `factory` describes.
    """
    lists = re.match(r"IVF(\d+)", factory)
    in_lists = num_indexed + (_ROWS_PADDED * int(lists[1]) if lists else 0)
    index_bytes = in_lists * faiss_index.bytes_per_key(factory, layer.head_dim)
    row_bytes = num_rows * layer.row_dim * dtype.itemsize
    return layer.num_key_value_heads * (row_bytes + index_bytes)


def can_select(number: int) -> bool:
    """Tell whether a GPU index can select this number of rows or lists."""
    return number < _SELECTION_LIMIT


@dataclass(frozen=True)
class GPULayer:
    """One layer's copy."""

    gpu: GPU
    heads: list[Any]  # a GPU index for each KV head
    parameters: list[Any]  # what `search` needs for each of them
    rows: torch.Tensor  # (M, Hkv, head_dim + value_head_dim)

    def search(self, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """Return inner products and positions, each (Hkv, N, k), for queries (Hkv, N, D)."""
        with self.gpu.searching:
            return faiss_index.search_heads(self.heads, queries, k, self.parameters)


class GPULayers:
    """The layers that are on a GPU now."""

    def __init__(self, gpu: GPU, rows: SearchableRows) -> None:
        self._gpu = gpu
        self._rows = rows
        self._chosen: set[int] | None = None  # layers that fit; None until there is one to move
        self._layers: dict[int, GPULayer] = {}
        self._moving = threading.Lock()

    def get(self, layer_idx: int) -> GPULayer | None:
        """Return a layer's copy if there is one."""
        return self._layers.get(layer_idx)

    def clear(self) -> None:
        """Forget all copies: the rows are others now."""
        self._layers.clear()
        self._chosen = None

    def moved(
        self,
        layer_idx: int,
        indexes: LayerIndexes,
        parameters: list[Any],
        *,
        factory: str,
        num_indexed: int,
        may_move: Iterable[int],
    ) -> GPULayer | None:
        """Return a layer's copy, made now if it is the first search and the layer fits.

        None for a layer that is left to the CPU: it does not fit, or looks into too many lists. Of
        the layers that `may_move`, whose indexes are built with `factory` and have `num_indexed`
        rows, as many are chosen as fit. The `parameters` have no selector.
        """
        copied = self._layers.get(layer_idx)
        if copied is not None or (self._chosen is not None and layer_idx not in self._chosen):
            return copied
        with self._moving:
            if self._chosen is None:
                layout, num_rows = self._rows.layout, self._rows.stored.num_rows
                sizes = {
                    idx: bytes_on_gpu(
                        layout.layers[idx], layout.dtype, num_rows, num_indexed, factory
                    )
                    for idx in may_move
                }
                self._chosen = set(layers_that_fit(sizes, self._gpu.free_bytes()))
            if layer_idx in self._chosen and layer_idx not in self._layers:
                moved = self._move(layer_idx, indexes.heads, parameters)
                if moved is None:
                    self._chosen.discard(layer_idx)
                else:
                    self._layers[layer_idx] = moved
        return self._layers.get(layer_idx)

    def _move(self, layer_idx: int, heads: list[Any], parameters: list[Any]) -> GPULayer | None:
        is_ivf = isinstance(faiss.downcast_index(heads[0]), faiss.IndexIVF)
        if is_ivf and not all(can_select(each.nprobe) for each in parameters):
            return None
        try:
            with self._gpu.searching:  # copying takes FAISS's resources, too
                indexes = [self._gpu.to_gpu(index) for index in heads]
            # A flat GPU index takes no parameters.
            taken = parameters if is_ivf else [None] * len(heads)
            rows = loaded(self._rows.stored, self._rows.layout, layer_idx, self._gpu.device)
            return GPULayer(self._gpu, indexes, taken, rows)
        except RuntimeError as error:  # the model has taken what was free a moment ago
            if _OUT_OF_MEMORY.search(str(error)) is None:
                raise
            return None
