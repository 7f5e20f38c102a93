"""A long text's rows, read once and remembered as far as they are asked for."""

from __future__ import annotations

from collections.abc import Collection

import torch
import numpy as np
from torch import Tensor

from emt.memory.memory import Memory
from memory_backends import Document, Rows


class GrowingMemory:
    """A memory of one text, longer and longer.

    The row of a token does not depend on how much text follows: the token is read in the first
    window that reaches it, and sees only what is before. So the rows of a text's first n tokens are
    the first n rows of a longer reading, and nothing is read twice.

    Each run of rows is a document of its own, so with `sinks="one"` the attention sinks of the
    text's first window are found, and those of no other. They are measured before the rows of
    dropped ids are taken out, so where <bos> has no row, fewer others are sinks than in `write`.

    Args:
        memory: where rows go; empty, or with other texts. Its settings say how the text is read.
        token_ids: (T,) int64, as far as rows may be wanted.
        drop_ids: token ids that have no row.
    """

    def __init__(self, memory: Memory, token_ids: Tensor, drop_ids: Collection[int] = ()) -> None:
        self._memory = memory
        self._token_ids = token_ids.to(torch.int32).numpy()
        self._drop_ids = sorted(drop_ids)
        self._runs = memory.read(token_ids) if len(token_ids) else iter(())
        self._rest: Rows | None = None
        self.length = 0

    def grow(self, length: int) -> None:
        """Remember the text up to its token `length`; nothing is forgotten.

        Raises:
            ValueError: the text has fewer tokens.
        """
        if length > len(self._token_ids):
            raise ValueError(f"length must be at most {len(self._token_ids)}; got {length}.")
        while self.length < length:
            run = self._rest or next(self._runs)
            count = min(len(run), length - self.length)
            self._add(_selected(run, np.arange(count)))
            self._rest = _selected(run, np.arange(count, len(run))) if count < len(run) else None
            self.length += count

    def _add(self, rows: Rows) -> None:
        start, stop = self.length, self.length + len(rows)
        token_ids = self._token_ids[start:stop]
        kept = np.flatnonzero(np.isin(token_ids, self._drop_ids, invert=True))
        if len(kept):
            rows = _selected(rows, kept)
            tokens = rows.tokens - np.int32(start)
            rows = Rows(rows.keys, rows.values, tokens, rows.sinks, rows.queries)
            document = Document(f"tokens {start} to {stop - 1}", token_ids)
            self._memory.backend.add(document, [rows])


def _selected(rows: Rows, places: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Rows:
    """Return some of the rows."""
    index = torch.from_numpy(places)
    keys, values, queries = (
        {idx: tensor.index_select(1, index.to(tensor.device)) for idx, tensor in part.items()}
        for part in (rows.keys, rows.values, rows.queries)
    )
    return Rows(keys, values, rows.tokens[places], rows.sinks[places], queries)
