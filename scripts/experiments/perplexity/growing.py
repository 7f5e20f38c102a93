"""A long text's rows, read once and remembered as far as they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import numpy as np
import numpy.typing as npt
from torch import Tensor

from emt.memory.memory import Memory
from memory_backends import Document, MemoryBackend, Rows


class GrowingMemory:
    """One text in several backends, longer and longer.

    What a token's row is does not depend on how much follows it: it is read in the first window
    that reaches it, and sees only what is before. So the rows of a text's first n tokens are the
    first n rows of a longer reading, and nothing is read twice.

    Each run of rows is a document of its own, so with `sinks="one"` the attention sinks of the
    text's first window are found, and those of no other.

    Args:
        memory: of the model that reads; its settings say how.
        token_ids: (T,) int64, as far as rows may be wanted.
        backends: where rows go; empty, or with other texts.
        drop_ids: token ids that have no row.
    """

    def __init__(
        self,
        memory: Memory,
        token_ids: Tensor,
        backends: Collection[MemoryBackend],
        drop_ids: Collection[int] = (),
    ) -> None:
        self._token_ids = token_ids.to(torch.int32).numpy()
        self._backends = backends
        self._drop_ids = sorted(drop_ids)
        self._runs = self._read(memory, token_ids)
        self._waiting: Rows | None = None
        self.length = 0

    def grow(self, length: int) -> None:
        """Remember the text up to its token `length`; nothing is forgotten.

        Raises:
            ValueError: the text has fewer tokens.
        """
        if length > len(self._token_ids):
            raise ValueError(f"length must be at most {len(self._token_ids)}; got {length}.")
        while self.length < length:
            run = self._waiting or next(self._runs)
            count = min(len(run), length - self.length)
            self._add(_part(run, 0, count))
            self._waiting = _part(run, count, len(run)) if count < len(run) else None
            self.length += count

    @staticmethod
    def _read(memory: Memory, token_ids: Tensor) -> Iterator[Rows]:
        if len(token_ids):
            yield from memory.read(token_ids)

    def _add(self, rows: Rows) -> None:
        start, stop = self.length, self.length + len(rows)
        token_ids = self._token_ids[start:stop]
        kept = np.flatnonzero(np.isin(token_ids, self._drop_ids, invert=True))
        if not len(kept):
            return
        if len(kept) < len(rows):
            rows = _picked(rows, kept)
        document = Document(f"tokens {start} to {stop - 1}", token_ids)
        rows = Rows(rows.keys, rows.values, rows.tokens - np.int32(start), rows.sinks, rows.queries)
        for backend in self._backends:
            backend.add(document, [rows])


def _part(rows: Rows, start: int, stop: int) -> Rows:
    keys, values, queries = (
        {idx: tensor[:, start:stop] for idx, tensor in part.items()}
        for part in (rows.keys, rows.values, rows.queries)
    )
    return Rows(keys, values, rows.tokens[start:stop], rows.sinks[start:stop], queries)


def _picked(rows: Rows, kept: npt.NDArray[np.intp]) -> Rows:
    index = torch.from_numpy(kept)
    keys, values, queries = (
        {idx: tensor.index_select(1, index.to(tensor.device)) for idx, tensor in part.items()}
        for part in (rows.keys, rows.values, rows.queries)
    )
    return Rows(keys, values, rows.tokens[kept], rows.sinks[kept], queries)
