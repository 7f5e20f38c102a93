"""FAISS indexes: from a factory string to a searchable index over L2-normalised keys.

Facts these functions rest on (FAISS 1.14.2 to 1.15.1):

* `index_factory` with the metric, never a constructor: `IndexIVFPQ`'s defaults to L2.
* Search parameters go with each call; setting `nprobe` on a shared index from several threads has
  crashed.
* Training wants at least 39 points a list.
* Imported after torch, FAISS runs on torch's OpenMP threads. Imported first, it has a team of its
  own, and each search waits for a core on which a thread of torch still spins: a decode step took
  five times as long. So it then searches on one thread.
* What `downcast_index` returns is freed with its argument: keep that alive.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import numpy as np
import numpy.typing as npt

from memory_backends.errors import IndexFactoryError, StoreError
from memory_backends.layout import Float32Array
from memory_backends.search.scores import Precision

try:
    import faiss
except ImportError as error:  # pragma: no cover - the test runs this in a process without faiss
    raise ImportError(
        "emt needs FAISS. Install it with `pip install 'emt[cpu]'`, "
        "or `pip install 'emt[gpu]'` on a machine with CUDA."
    ) from error

POINTS_PER_LIST = 39  # FAISS's own minimum, `ClusteringParameters.min_points_per_centroid`
_TRAIN_POINTS_PER_LIST = 40
# A scalar quantizer cuts off what lies outside the ranges it has seen, so it must see many rows.
_RANGE_ROWS = 1024
_MIN_SAMPLE = 4_096
# An IVF index that was not calibrated looks into one list of 8, and at least 4.
_SCANNED_SHARE = 8
_MIN_SCANNED = 4
_MAX_LISTS = 2**20

# `auto`: exact below, IVF from here on; `benchmarks/decode.md` has the times of both.
AUTO_IVF_ROWS = 8_192

_SCALAR_QUANTIZERS = (faiss.IndexScalarQuantizer, faiss.IndexIVFScalarQuantizer, faiss.IndexHNSWSQ)
# IVF indexes that refuse a selector.
_NO_SELECTOR = (faiss.IndexIVFAdditiveQuantizer, faiss.IndexIVFAdditiveQuantizerFastScan)


def check_factory(factory: str, dim: int) -> None:
    """Raise an IndexFactoryError for a factory string that cannot serve a memory.

    FAISS rejects it, or its index cannot leave removed rows out of a search.
    """
    if factory == "auto":
        return
    index = new_index(factory, dim)
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform) and inner.index.d > dim:
        raise IndexFactoryError(
            f"index {factory!r} must keep at most the {dim} components of a key; it makes "
            f"{inner.index.d} of them. Use a number up to {dim}."
        )
    search_parameters(index, None, name=factory)
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:  # FAISS ignores the metric for HNSW over PQ
        raise IndexFactoryError(
            f"index {factory!r} must search by inner product, metric {faiss.METRIC_INNER_PRODUCT}; "
            f"FAISS makes it with metric {index.metric_type}. Use IVF for product quantization."
        )


def new_index(factory: str, dim: int) -> Any:
    """Return an empty inner-product index; raise an IndexFactoryError if FAISS rejects it."""
    lists = re.search(r"IVF(\d+)", factory)
    if lists and int(lists[1]) > _MAX_LISTS:
        raise IndexFactoryError(
            f"index must have at most {_MAX_LISTS} inverted lists, which FAISS makes at once; "
            f"got {factory!r}."
        )
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise IndexFactoryError(
            f"index must be 'auto' or a FAISS factory string for {dim}-dimensional inner products, "
            f"such as 'Flat' or 'IVF256,SQfp16'; got {factory!r}. FAISS says: {_reason(error)}"
        ) from error
    inner = faiss.downcast_index(index)
    has_flat_quantizer = isinstance(inner, faiss.IndexIVF) and isinstance(
        faiss.downcast_index(inner.quantizer), faiss.IndexFlat
    )
    if has_flat_quantizer:
        inner.cp.spherical = False  # lists trained with L2 find more than spherical ones
    if isinstance(inner, faiss.IndexIVFScalarQuantizer) and (
        inner.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    ):
        inner.by_residual = False  # half precision gains nothing by it, and see `lists.py`
    return index


def factory_for(factory: str, num_rows: int, dim: int) -> str:
    """Return the factory string to build with, given how many rows there are to train on.

    "auto" is "Flat" below `AUTO_IVF_ROWS` and IVF with half-precision codes above. A string that
    needs training is "Flat" until there are enough rows.
    """
    if factory == "auto":
        if num_rows < AUTO_IVF_ROWS:
            return "Flat"
        most = int(np.log2(num_rows / POINTS_PER_LIST))
        num_lists = 2 ** min(round(np.log2(2 * num_rows**0.5)), most)
        return f"IVF{num_lists},SQfp16"
    return factory if num_rows >= _rows_to_train(new_index(factory, dim)) else "Flat"


def training_rows(index: Any) -> int:
    """Return how many rows are a good sample to train an index on; 0 if it needs none."""
    needed = _rows_to_train(index)
    return max(needed * _TRAIN_POINTS_PER_LIST // POINTS_PER_LIST, _MIN_SAMPLE) if needed else 0


def search_parameters(
    index: Any,
    searchable: npt.NDArray[np.uint8] | None,
    nprobe: int | None = None,
    wider: float = 1.0,
    name: str = "this index",
) -> Any:
    """Return what `search` needs for an index, and for others like it.

    Args:
        index: any index that `check_factory` accepts.
        searchable: little-endian bitmap over positions, or None for all of them.
        nprobe: lists that an IVF index looks into; None for one in `_SCANNED_SHARE`.
        wider: times as many lists, or neighbours of an HNSW index, are looked into.
        name: of the index, in the error.

    Raises:
        IndexFactoryError: the index cannot leave removed rows out of a search.
    """
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        parameters = search_parameters(inner.index, searchable, nprobe, wider, name)
        return faiss.SearchParametersPreTransform(index_params=parameters)
    options = {} if searchable is None else {"sel": faiss.IDSelectorBitmap(searchable)}
    if isinstance(inner, faiss.IndexIVF) and inner.nlist and not isinstance(inner, _NO_SELECTOR):
        share = max(inner.nlist // _SCANNED_SHARE, _MIN_SCANNED)
        effort = min(math.ceil(wider * (share if nprobe is None else nprobe)), inner.nlist)
        return faiss.SearchParametersIVF(nprobe=effort, **options)
    if isinstance(inner, faiss.IndexHNSW):
        effort = min(math.ceil(wider * max(inner.hnsw.efSearch, 64)), max(inner.ntotal, 64))
        return faiss.SearchParametersHNSW(efSearch=effort, **options)
    if isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexRaBitQ):
        return faiss.SearchParameters(**options)
    raise IndexFactoryError(
        "index must be 'auto' or a factory string of the families Flat, SQ, RaBitQ, IVF and HNSW; "
        f"got {name!r}, a FAISS {type(inner).__name__}, which cannot leave removed rows out of a "
        "search."
    )


def search(
    index: Any, queries: Float32Array, k: int, parameters: Any
) -> tuple[Float32Array, npt.NDArray[np.int64]]:
    """Search one index, with parameters of `search_parameters`.

    Returns:
        Inner products and positions, each (N, k), best first, for queries (N, dim); -inf and -1
        where there are fewer.
    """
    with _one_team():
        scores, positions = index.search(queries, k, params=parameters)
    scores[positions < 0] = -np.inf
    return scores, positions


def search_heads(
    heads: Sequence[Any], queries: Float32Array, k: int, parameters: Sequence[Any]
) -> tuple[Float32Array, npt.NDArray[np.int64]]:
    """Do what `search` does for h KV heads: queries (h, N, dim) to (h, N, k); k may be 0."""
    scores = np.empty((*queries.shape[:2], k), dtype=np.float32)
    positions = np.empty((*queries.shape[:2], k), dtype=np.int64)
    for head, index in enumerate(heads if k else ()):
        scores[head], positions[head] = search(index, queries[head], k, parameters[head])
    return scores, positions


def search_positions(
    index: Any, queries: Float32Array, k: int, parameters: Any
) -> npt.NDArray[np.int64]:
    """Do what `search` does, for float32 contiguous queries, less the scores.

    A decode step does without them, and without the checks of FAISS's Python layer.
    """
    scores = np.empty((len(queries), k), dtype=np.float32)
    positions = np.empty((len(queries), k), dtype=np.int64)
    query, score, position = map(faiss.swig_ptr, (queries, scores, positions))
    with _one_team():
        index.search_c(len(queries), query, k, score, position, parameters)
    return positions


def read_index(path: Path, dim: int, num_rows: int, *, mapped: bool = False) -> Any:
    """Read a FAISS file and check that it has `num_rows` vectors of `dim` components.

    With `mapped`, inverted lists stay in the file, and are mapped where FAISS can.

    Raises:
        StoreError: missing, damaged, of another size, or not of inner products.
    """
    advice = "Run `emt rebuild`: the index is made anew from the rows."
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY | (mapped * faiss.IO_FLAG_MMAP))
    except (RuntimeError, MemoryError) as error:
        state = "is damaged or truncated" if path.exists() else "is missing"
        raise StoreError(f"FAISS file '{path}' {state}. {advice}") from error
    if (index.d, index.ntotal) != (dim, num_rows):
        raise StoreError(
            f"FAISS file '{path}' must hold {num_rows} vectors of {dim} components; "
            f"it holds {index.ntotal} of {index.d}. {advice}"
        )
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise StoreError(
            f"FAISS file '{path}' must be of metric {faiss.METRIC_INNER_PRODUCT}, inner product; "
            f"it is of metric {index.metric_type}. {advice}"
        )
    lists = mapped_lists(index)
    if lists is not None:
        if not mapped or lists.filename:  # mapped from this file, they have no name of their own
            raise StoreError(
                f"FAISS file '{path}' must have its inverted lists in itself; they are in "
                f"'{lists.filename}'. {advice}"
            )
        lists.prefetch_nthread = 0  # threads that FAISS would start for each search
    return index


def mapped_lists(index: Any) -> Any | None:
    """Return an index's inverted lists if they are mapped from its file, else None."""
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if not isinstance(inner, faiss.IndexIVF):
        return None
    lists = faiss.downcast_InvertedLists(inner.invlists)
    return lists if isinstance(lists, faiss.OnDiskInvertedLists) else None


def write_index(index: Any, path: Path) -> None:
    """Write a FAISS file; raise an OSError if the disk is full or read-only."""
    assert mapped_lists(index) is None, "FAISS would write a reference to the old file"
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"FAISS could not write '{path}': {_reason(error)}") from error


def bytes_per_key(factory: str, dim: int) -> int:
    """Estimate the bytes an index takes for one key: its codes, and its id in an inverted list."""
    codes = factory.rpartition(",")[2]
    per_component = {"SQfp16": 2, "SQ8": 1}.get(codes, 4)
    return per_component * dim + (8 if factory.startswith("IVF") else 0)


def precision_of(factory: str) -> Precision:
    """Tell how good the scores of an index are, by what it keeps of its vectors."""
    *before, codes = factory.split(",")
    if any(part.startswith(("PCA", "OPQ", "RR", "ITQ")) for part in before):
        return "coarse"
    if codes in ("Flat", "") or codes.startswith("HNSW"):
        return "exact"
    return "half" if codes == "SQfp16" else "coarse"


def shares_threads() -> bool:
    """Tell whether FAISS runs on torch's OpenMP threads."""
    torch.get_num_threads()  # the first call sets the number
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(before + 1)
    try:
        return bool(torch.get_num_threads() == before + 1)
    finally:
        faiss.omp_set_num_threads(before)


_SHARES_THREADS = shares_threads()


@contextlib.contextmanager
def _one_team() -> Iterator[None]:
    """Keep FAISS to the calling thread if its OpenMP threads are not torch's."""
    if _SHARES_THREADS:
        yield
        return
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _reason(error: RuntimeError) -> str:
    """Return what FAISS says is wrong, without where in its source it says so."""
    message = " ".join(str(error).split())
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", message)


def _rows_to_train(index: Any) -> int:
    """Return how many rows an index must see to be trained: 0 for one that needs no training."""
    if index.is_trained:
        return 0
    inner = faiss.downcast_index(index)
    rows = POINTS_PER_LIST
    if isinstance(inner, faiss.IndexPreTransform):
        # PCA needs a row a component; OPQ's own quantizer has 256 centroids.
        rows = max(inner.d, 256)
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexIVF):
        rows = max(rows, POINTS_PER_LIST * inner.nlist)
    if isinstance(inner, faiss.IndexIVFPQ | faiss.IndexIVFPQFastScan):
        rows = max(rows, POINTS_PER_LIST * inner.pq.ksub)
    if isinstance(inner, _SCALAR_QUANTIZERS):
        rows = max(rows, _RANGE_ROWS)
    return int(rows)
