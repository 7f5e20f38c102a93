"""The contract of a memory backend: add, search, fetch, remove, save, open, len.

A backend holds one row a token: at every layer, `num_key_value_heads` keys and values. A row has
the same id in every layer and head, ids are never used again, and removing rows moves no other.
`search` finds rows, one (layer, KV head) at a time; `fetch` gives their keys and values. Backends
differ in how they search and in where rows live, and in nothing else.

Any number of threads may search one backend at a time, but not while it writes. Any number of
processes may have a store open while one of them writes: the others see what was there when they
opened it, less what they have not read yet and is removed by then.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import filelock
import numpy as np
import torch

from memory_backends.catalog import FILE_NAME as CATALOG_FILE_NAME
from memory_backends.catalog import Catalog
from memory_backends.errors import DocumentError, MemoryMismatchError, StoreError, reported
from memory_backends.layout import Document, Int64Array, LayerLayout, MemoryLayout, Rows
from memory_backends.rows import RowFiles, RowStorage
from memory_backends.validation import (
    LOCK_FILE_NAME,
    check_directory,
    check_document,
    check_free,
    check_rows,
    check_search,
    has_no_store,
)

Sinks = Literal["all", "one"]

# "exact": right but for the rounding of float32; "half": good to 1e-3; "coarse": a rough guide.
Precision = Literal["exact", "half", "coarse"]

_ROWS_PER_COPY = 4096
_SPARE_CANDIDATES = 4  # near neighbours of the k-th, among which rounding may have chosen wrongly
_ROUNDING = 1e-6  # of a float32 cosine, with room to spare
_TINY = 1e-300


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        scores: (Hkv, N, k) float32 cosine similarities, best first; -inf where there is nothing.
        ids: (Hkv, N, k) int64 row ids; -1 where there is nothing.
    """

    scores: torch.Tensor
    ids: torch.Tensor


class MemoryBackend(ABC):
    """Rows of one memory, with their documents. See the module docstring for the contract.

    Args:
        layout: the shape of the rows. A store that is opened must have the same.
        path: the store's directory. It is opened if it exists; else the first `add` creates it.
            None for a memory that is not kept.
        identity: what the model that writes these rows looks like, as plain JSON types; a store
            that another model wrote is refused.
        sinks: which rows a search may find: "all", or all with only "one" set of attention sinks,
            those of the first document that has some.

    Raises:
        MemoryMismatchError: the store at `path` has another layout or identity.
        StoreError: `path` is not a directory with a store, or a file in it is missing or truncated.
    """

    _is_temporary = False  # True if `path` is not the user's and goes when the object does

    def __init__(
        self,
        layout: MemoryLayout,
        *,
        path: Path | str | None = None,
        identity: Mapping[str, Any] | None = None,
        sinks: Sinks = "all",
    ) -> None:
        if sinks not in ("all", "one"):
            raise MemoryMismatchError(f"sinks must be 'all' or 'one'; got {sinks!r}.")
        self.layout = layout
        self.path = None if path is None else Path(path)
        self.sinks: Sinks = sinks
        # Through JSON once, so that what is compared later is what a store gives back.
        self._identity = json.loads(json.dumps(dict(identity or {})))
        self._thread_writes = threading.Lock()
        self._searchable: Int64Array | None = None
        self._catalog = self._open_catalog()
        self._rows = self._open_rows()

    # -- the contract ---------------------------------------------------------------------------

    def search(self, layer_idx: int, queries: torch.Tensor, k: int) -> SearchResult:
        """Find the rows with the highest cosine similarity to each query, for each KV head.

        The backend's own search finds a few more rows than asked for. Where float32 cannot tell
        the order of two of them, or the index keeps its vectors coarsely, they are ranked by their
        exact cosine, computed from the stored rows in float64, equal ones by id. So exact backends
        agree to the last id, unless more rows than the spare ones are exactly equal; scores of
        half-precision indexes are good to 1e-3.

        Args:
            layer_idx: the model's layer.
            queries: (Hkv, N, head_dim), any floating dtype, need not be normalised.
            k: how many rows to return for each query; at most `len(self)` are found.

        Returns:
            Scores and ids, each (Hkv, N, k), on the device of the rows.

        Raises:
            MemoryMismatchError: a shape or layer that is not the layout's, or k < 1.
        """
        check_search(self._layer(layer_idx), queries, k)
        queries = queries.detach().float()
        found = min(k + _SPARE_CANDIDATES, len(self))
        unit = torch.nn.functional.normalize(queries, dim=-1)
        scores, ids = self._candidates(layer_idx, unit, found)
        if self._precision == "coarse" or (self._precision == "exact" and _has_ties(scores, k)):
            scores, ids = self._ranked(layer_idx, queries, ids)
        scores, ids = scores[..., :k], ids[..., :k]
        if found < k:
            scores = torch.nn.functional.pad(scores, (0, k - found), value=-torch.inf)
            ids = torch.nn.functional.pad(ids, (0, k - found), value=-1)
        return SearchResult(scores, ids)

    def add(self, document: Document, rows: Iterable[Rows], *, replace: bool = False) -> range:
        """Store a document and its rows, all or nothing.

        Args:
            document: its name must be new, or `replace` True.
            rows: runs of consecutive rows, in order; read one at a time, so a generator that
                encodes as it goes needs memory for one run only.
            replace: remove the document of that name in the same transaction.

        Returns:
            The ids of the rows, consecutive.

        Raises:
            DocumentError: the name is taken, there are no rows, or ids and offsets do not fit.
            MemoryMismatchError: rows of another shape or dtype, or of tokens that the document does
                not have; a key or value that is NaN or infinite, or a key that is zero.
            StoreError: the store cannot be written, or another process or thread is writing to it.

            Whatever is raised, by `rows` too, the memory is as it was before.
        """
        check_document(document)
        with self._writing():
            if not replace and self._catalog.has_document(document.name):
                raise DocumentError(
                    f"document '{document.name}' is already in the memory. "
                    "Remove it first, or give this one another name."
                )
            tokens, sinks = [], []
            num_rows = 0
            try:
                for run in rows:
                    check_rows(run, self.layout, document, first=num_rows)
                    with reported(self.path):
                        self._rows.append(run)
                    tokens.append(run.tokens)
                    sinks.append(num_rows + np.flatnonzero(run.sinks))
                    num_rows += len(run)
                if not num_rows:
                    raise DocumentError(
                        f"document '{document.name}' has no rows to remember. "
                        "Give it at least one token that is not a special id."
                    )
                with reported(self.path):
                    checksums = self._rows.flush()
                ids = self._catalog.publish(
                    document,
                    np.concatenate(tokens).astype(np.int32),
                    np.concatenate(sinks).astype(np.int32),
                    checksums,
                    replace=replace,
                )
            finally:  # the catalogue knows whether they are part of the memory
                self._rows.publish(self._catalog.num_rows)
        self._rows_changed()
        return ids

    def fetch(self, layer_idx: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of rows, one set of ids for each KV head.

        Args:
            layer_idx: the model's layer.
            ids: (Hkv, ...) int64; an id of -1 gives some finite numbers, for the caller to mask.

        Returns:
            Keys (Hkv, ..., head_dim) and values (Hkv, ..., value_head_dim), in the layout's dtype.

        Raises:
            MemoryMismatchError: an id that was never given out, or a wrong shape.
        """
        layer = self._layer(layer_idx)
        num_heads = layer.num_key_value_heads
        if ids.ndim < 1 or ids.shape[0] != num_heads or ids.dtype != torch.int64:
            raise MemoryMismatchError(
                f"ids must be int64 of shape (num_key_value_heads={num_heads}, ...); "
                f"got {ids.dtype} {tuple(ids.shape)}."
            )
        rows = self._stored(layer_idx)  # (M, Hkv, D + Dv)
        ids = ids.to(rows.device)
        if ids.numel():
            least, greatest = (int(bound) for bound in ids.aminmax())
            if not -1 <= least <= greatest < len(rows):
                raise MemoryMismatchError(
                    f"row ids must be less than {len(rows)}, the rows written so far, or -1; "
                    f"got {least} to {greatest}."
                )
        found = self._gather(layer_idx, ids)
        return found[..., : layer.head_dim], found[..., layer.head_dim :]

    def remove(self, ids: Iterable[int]) -> None:
        """Remove single rows; no other row changes its id.

        Raises:
            MemoryMismatchError: an id that was never given out.
        """
        with self._writing():
            self._catalog.remove_rows(ids)
        self._rows_changed()

    def remove_document(self, name: str) -> int:
        """Remove a document and its rows; return how many rows it had.

        Raises:
            DocumentError: there is none of that name.
        """
        with self._writing():
            removed = self._catalog.remove_document(name)
        self._rows_changed()
        return removed

    def clear(self) -> None:
        """Remove everything. Ids are not used again."""
        with self._writing():
            self._catalog.remove_all()
        self._rows_changed()

    def save(self, path: Path | str | None = None) -> None:
        """Write the memory to a store directory that every backend opens.

        Args:
            path: a directory that does not exist or is empty; None for the memory's own path.

        Raises:
            StoreError: there is no path, it is taken, or it cannot be written.
        """
        target = self._copy_target(path)
        if target is not None:
            directory = check_free(target)
            with self._writing(), reported(directory):  # so that no other process adds meanwhile
                self._copy_to(directory)
        elif self._catalog.path is None:
            with self._writing():  # makes the store, which has nothing in it yet
                pass

    @classmethod
    def open(cls, path: Path | str, **options: Any) -> Self:
        """Open an existing store with the layout it has.

        Args:
            path: the store's directory.
            **options: further arguments of the class.

        Raises:
            StoreError: there is no store at `path`, or it is damaged.
        """
        directory = check_directory(Path(path))
        with contextlib.closing(Catalog.open(directory)) as catalog:
            layout = catalog.layout
            options.setdefault("identity", catalog.identity)
        return cls(layout, path=directory, **options)

    def __len__(self) -> int:
        """Rows that a search may find."""
        return len(self._searchable_rows())

    def close(self) -> None:
        """Let go of files; the object is of no use afterwards."""
        self._rows.close()
        self._catalog.close()

    @property
    def catalog(self) -> Catalog:
        """The memory's documents and settings."""
        return self._catalog

    # -- for subclasses -------------------------------------------------------------------------

    @abstractmethod
    def _open_rows(self) -> RowStorage:
        """Return where this backend keeps its rows."""

    @abstractmethod
    def _candidates(self, layer_idx: int, unit_queries: torch.Tensor, k: int) -> SearchResult:
        """Find the k rows nearest to each query.

        Args:
            layer_idx: one of the layout's.
            unit_queries: (Hkv, N, head_dim) float32 of unit length, on the queries' device.
            k: at most `len(self)`; may be 0.

        Returns:
            As `search`, with scores as good as `_precision` says.
        """

    @property
    def _precision(self) -> Precision:
        """How good the scores of `_candidates` are."""
        return "exact"

    def _ranked(self, layer_idx: int, queries: torch.Tensor, ids: torch.Tensor) -> SearchResult:
        """Rank candidates by exact cosine, equal ones by id."""
        ids = ids.sort(dim=-1).values  # a stable sort by score leaves ties in this order
        keys = self._gather(layer_idx, ids)[..., : queries.shape[-1]].double()  # (Hkv, N, c, D)
        query = queries.to(keys.device).double().unsqueeze(-1)
        norms = keys.norm(dim=-1) * query.norm(dim=-2)
        scores = (keys @ query).squeeze(-1) / norms.clamp(min=_TINY)
        scores = scores.masked_fill(ids < 0, -torch.inf)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        return SearchResult(scores.float(), ids.gather(-1, order))

    def _gather(self, layer_idx: int, ids: torch.Tensor) -> torch.Tensor:
        """Return rows by id: (Hkv, ...) to (Hkv, ..., head_dim + value_head_dim); any for -1."""
        rows = self._stored(layer_idx)  # (M, Hkv, D + Dv)
        num_rows, num_heads, row_dim = rows.shape
        if not num_rows:
            return rows.new_zeros(*ids.shape, row_dim)
        heads = torch.arange(num_heads, device=rows.device).view(-1, *[1] * (ids.ndim - 1))
        flat = ids.clamp(min=0) * num_heads + heads
        return rows.flatten(0, 1).index_select(0, flat.flatten()).view(*ids.shape, row_dim)

    def _stored(self, layer_idx: int) -> torch.Tensor:
        """Return all rows of a layer for `fetch`, (M, Hkv, head_dim + value_head_dim)."""
        return self._rows.layer(layer_idx)

    def _rows_changed(self) -> None:
        """Forget what was derived from the set of rows."""
        self._searchable = None

    def _searchable_rows(self) -> Int64Array:
        if self._searchable is None:
            known = self._rows.num_rows  # another process may have added more since
            searchable = self._catalog.searchable_rows(self.sinks)
            self._searchable = searchable[searchable < known]
        return self._searchable

    def _layer(self, layer_idx: int) -> LayerLayout:
        if layer_idx not in self.layout.layers:
            raise MemoryMismatchError(
                f"layer must be one of {sorted(self.layout.layers)}; got {layer_idx}."
            )
        return self.layout.layers[layer_idx]

    def _copy_target(self, path: Path | str | None) -> Path | None:
        """Return where `save` puts a copy; None if `path` is where the memory is kept already.

        Raises:
            StoreError: no path, and the memory is not kept.
        """
        if path is None and (self.path is None or self._is_temporary):
            raise StoreError(
                "this memory has no path. Give save() one, or set `path` in the config."
            )
        own = self.path is not None and path is not None and self.path.resolve()
        return None if path is None or Path(path).resolve() == own else Path(path)

    # -- opening --------------------------------------------------------------------------------

    def _open_catalog(self) -> Catalog:
        if self.path is None or has_no_store(self.path):
            return Catalog.in_memory(self.layout, self._identity)  # until the first write
        catalog = Catalog.open(check_directory(self.path))
        with contextlib.ExitStack() as on_error:
            on_error.callback(catalog.close)
            catalog.check_identity(self._identity)
            if catalog.layout != self.layout:
                raise MemoryMismatchError(
                    f"memory at '{self.path}' has layout {catalog.layout.to_json()}; "
                    f"this model has {self.layout.to_json()}. Load the model that wrote the store."
                )
            on_error.pop_all()
        return catalog

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Let one thread of one process write, to a store that is there and known as it is now."""
        if not self._thread_writes.acquire(blocking=False):
            raise StoreError("this memory is being written to already. Let that end first.")
        with contextlib.ExitStack() as locks:
            locks.callback(self._thread_writes.release)
            if self.path is not None:
                with reported(self.path):
                    locks.enter_context(_locked(self.path))
                    if self._catalog.path is None:
                        locks.push(self._make_store(self.path))
                self._rows.publish(self._catalog.num_rows)  # another process may have added some
            yield

    def _make_store(self, path: Path) -> Callable[..., None]:
        """Make the store of the first write; return how to take it away if that write fails."""
        is_ours = not (path / CATALOG_FILE_NAME).exists()  # or another process was first
        if is_ours:
            self._catalog.copy_to(path, {})
        self._use(self._open_catalog())

        def after(error: type[BaseException] | None, *_: object) -> None:
            if error is not None and is_ours:
                self._use(self._catalog.copy_in_memory())
                (path / CATALOG_FILE_NAME).unlink()  # first: without it, it is not a store
                shutil.rmtree(path / "rows", ignore_errors=True)
                shutil.rmtree(path / "index", ignore_errors=True)

        return after

    def _use(self, catalog: Catalog) -> None:
        self._catalog.close()
        self._catalog = catalog
        self._rows.close()
        self._rows = self._open_rows()

    def _copy_to(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        num_rows = self._catalog.num_rows
        try:
            with contextlib.closing(RowFiles(self.layout, directory, 0)) as files:
                for first in range(0, num_rows, _ROWS_PER_COPY):
                    files.append(self._copy_of_rows(first, min(first + _ROWS_PER_COPY, num_rows)))
                checksums = files.flush()
                files.publish(num_rows)
            self._catalog.copy_to(directory, checksums)  # last: before, it is not a store
        except BaseException:
            shutil.rmtree(directory / "rows", ignore_errors=True)
            raise

    def _copy_of_rows(self, first: int, stop: int) -> Rows:
        keys, values = {}, {}
        for idx, layer in self.layout.layers.items():
            span = self._rows.layer(idx)[first:stop].transpose(0, 1)  # (Hkv, n, D + Dv)
            keys[idx], values[idx] = span[..., : layer.head_dim], span[..., layer.head_dim :]
        return Rows.of(keys, values)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the write lock of the store at `path`."""
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / LOCK_FILE_NAME, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(
            f"another process is writing to '{path}'. Wait for it, or stop it."
        ) from None
    try:
        yield
    finally:
        if is_new and has_no_store(path):  # the first write failed
            shutil.rmtree(path, ignore_errors=True)
        lock.release()


def _has_ties(scores: torch.Tensor, k: int) -> bool:
    """Tell whether rounding may have decided which k rows came first, or their order."""
    return bool((scores[..., :-1] - scores[..., 1:])[..., :k].lt(_ROUNDING).any())
