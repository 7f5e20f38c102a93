"""Rows in mapped files, as records that a codec makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from memory_backends.layout import Heads, MemoryLayout, Rows
from memory_backends.rows.append_files import CODED, FIRST, AppendFiles
from memory_backends.rows.base import Flushed, interleave
from memory_backends.rows.coding import RowCoding
from memory_backends.rows.records import LayerRecords

FOLDER = "rows"
ROWS_TO_LEARN = 512  # what a codec learns from; a store with fewer rows keeps them exactly

# Yields (document, first, stop) of committed rows, ascending: those that are worth encoding.
Spans = Callable[[], Iterable[tuple[str, int, int]]]


class RowFiles:
    """Rows in one file a layer, `rows/layer-000.bin`: records one after another, no header.

    Committed rows are mapped read-only, so opening reads nothing and memory is the page cache's.

    A codec that learns needs many rows to learn from. Until there are, rows are kept exactly, in
    `rows/first-000.bin`. The write that makes them enough learns from all of them, encodes those
    before it, too, and commits all of it at once; a long document waits in RAM only until then.
    Without a `coding`, rows are kept exactly.

    Attributes:
        num_rows: how many rows are committed.
        is_learned: whether the files of committed rows have what the codec makes of them.
        files: the files of records.
        row_crc32: of each document sealed and written since the last `show`: layer ->
            crc32 of its records.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        directory: Path,
        num_rows: int,
        coding: RowCoding | None = None,
        spans: Spans = tuple,
    ) -> None:
        self.coding = coding or RowCoding(layout, "exact")
        self._exact = self.coding.exactly()
        self._spans = spans
        self._layout = layout
        self._folder = directory / FOLDER
        self.num_rows = num_rows
        self.row_crc32: list[dict[int, int]] = []
        self._moved_crc32: dict[str, dict[int, int]] = {}
        # Runs (layer -> rows) that wait to be written; the last list is the unsealed document's.
        self._waiting: list[list[dict[int, torch.Tensor]]] = [[]]
        self._open()

    def _open(self) -> None:
        """Open the files of committed rows, which are what is written to until `_learn`."""
        self.is_learned = not self.coding.must_learn
        self.files = self._target = self._files(self.num_rows, is_learned=self.is_learned)

    def _files(self, num_rows: int, *, is_learned: bool) -> AppendFiles:
        sizes = (self.coding if is_learned else self._exact).record_bytes
        kind = CODED if is_learned else FIRST
        return AppendFiles(self._folder, sizes, dict.fromkeys(sizes, num_rows), kind)

    def append(self, rows: Rows) -> None:
        """Put rows after everything appended so far; they reach the disk at `flush`.

        Raises:
            MemoryMismatchError: a number that the codec's records cannot hold.
            StoreError: the codec's committed state is damaged.
        """
        if rows.records and not self.coding.must_learn:
            for idx, records in rows.records.items():
                self.append_records(idx, records)
            return
        self._waiting[-1].append({idx: interleave(rows, idx).cpu() for idx in self._layout.layers})
        if not self.coding.must_learn:
            self._write_waiting()
        elif self._num_to_learn_from >= ROWS_TO_LEARN:
            self._learn(rows.queries)
            self._write_waiting()

    def append_rows(self, layer_idx: int, rows: torch.Tensor) -> None:
        """Put rows (n, Hkv, D + Dv) after everything appended to one layer; errors as `append`."""
        records = self.coding.records(layer_idx) or self._exact.records(layer_idx)
        assert records is not None
        self.append_records(layer_idx, records.encode(rows.cpu()))

    def append_records(self, layer_idx: int, records: torch.Tensor) -> None:
        """Put records (n, record_bytes) uint8 after everything appended to one layer so far."""
        if len(records):
            self._target[layer_idx].append(records.contiguous().numpy().data)

    def skip(self, num_rows: int) -> None:
        """Leave room for rows that nobody reads, without taking space on the disk."""
        for idx in self._layout.layers if num_rows else ():
            self._target[idx].skip(num_rows)

    def seal(self) -> None:
        """End a document."""
        self._waiting.append([])
        if not (self.coding.must_learn and self._num_waiting):
            self._write_waiting()

    def rewind(self) -> None:
        """Drop what was appended since the last seal."""
        self._waiting[-1] = []
        self._target.rewind()

    def flush(self) -> Flushed:
        """Force appended rows to the disk."""
        self._write_waiting()
        self._target.flush()
        return Flushed(self.row_crc32, self.coding.new_states, self._moved_crc32)

    def show(self, num_rows: int, *, anew: bool = False) -> None:
        """Show the first `num_rows` rows; forget what was appended after them, give space back."""
        self.num_rows = num_rows
        self.row_crc32, self._waiting, self._moved_crc32 = [], [[]], {}
        self.coding.forget_new()
        before, has_learned = self.files, not self.coding.must_learn
        if has_learned and not self.is_learned and self._target is before:  # another process has
            self._open()
            return
        if has_learned != self.is_learned:
            self.is_learned, self.files = has_learned, self._target
        self.files.show(dict.fromkeys(self._layout.layers, num_rows), anew=anew)
        if self.files is not before:
            before.remove()
        elif self._target is not self.files:  # the commit of what was learned has failed
            self._target.remove()
            self._target = self.files

    def gather(self, layer_idx: int, ids: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Return committed rows by id: (h, ...) int64 to (h, ..., D + Dv); any for -1."""
        return self._records(layer_idx).gather(self.files[layer_idx].records, ids.cpu(), heads)

    def take(self, layer_idx: int, places: torch.Tensor) -> torch.Tensor:
        """Return heads' rows by place, id * Hkv + head: (Hkv, ...) to (Hkv, ..., D + Dv)."""
        return self._records(layer_idx).take(self.files[layer_idx].records, places)

    def span(self, layer_idx: int, first: int, stop: int, heads: Heads = None) -> torch.Tensor:
        """Return consecutive committed rows, (stop - first, h, D + Dv), of `heads` or all Hkv."""
        return self._records(layer_idx).span(self.records(layer_idx, first, stop), heads)

    def records(self, layer_idx: int, first: int, stop: int) -> torch.Tensor:
        """Return consecutive committed records, (stop - first, record_bytes) uint8, mapped."""
        return self.files[layer_idx].records[first:stop]

    def close(self) -> None:
        """Let go of the files; tensors handed out stay valid."""
        self.files.close()

    @property
    def _num_waiting(self) -> int:
        anywhere = next(iter(self._layout.layers))
        return sum(len(run[anywhere]) for document in self._waiting for run in document)

    @property
    def _num_to_learn_from(self) -> int:
        """How many rows there are, without those of removed documents."""
        return self._num_waiting + sum(stop - first for _, first, stop in self._spans())

    def _learn(self, queries: Mapping[int, torch.Tensor]) -> None:
        """Learn from the committed rows and those that wait, and encode the committed ones.

        Queries are those of the last run alone: a write that was interrupted and resumed learns the
        same, and those of committed rows are not kept.
        """
        spans = list(self._spans())
        runs = [run for document in self._waiting for run in document]
        for idx in self._layout.layers:
            committed = [self.span(idx, first, stop) for _, first, stop in spans]
            first_rows = torch.cat([*committed, *(run[idx] for run in runs)])
            self.coding.learn(idx, first_rows, queries.get(idx))
        first_files, self._target = self._target, self._files(0, is_learned=True)
        try:
            end = 0
            for name, first, stop in spans:
                self.skip(first - end)
                for idx in self._layout.layers:
                    self.append_rows(idx, self.span(idx, first, stop))
                self._moved_crc32[name] = self._target.seal()
                end = stop
            self.skip(self.num_rows - end)
            self._target.seal()
        except BaseException:
            with contextlib.suppress(OSError):
                self._target.show({})
            self._target, self._moved_crc32 = first_files, {}
            self.coding.forget_new()
            raise

    def _write_waiting(self) -> None:
        """Write the rows that wait; what fails still waits."""
        while True:
            for run in self._waiting[0]:
                for idx, rows in run.items():
                    self.append_rows(idx, rows)
            if len(self._waiting) == 1:
                break
            self.row_crc32.append(self._target.seal())
            del self._waiting[0]
        self._waiting = [[]]

    def _records(self, layer_idx: int) -> LayerRecords:
        """Return what decodes the committed records of a layer."""
        records = (self.coding if self.is_learned else self._exact).records(layer_idx)
        assert records is not None
        return records
