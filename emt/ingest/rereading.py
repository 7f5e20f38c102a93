"""Rows that a store does not keep: the model reads a passage's tokens again when it is recalled.

Rows are read in blocks of 128 of a document, each after the document's first tokens and the tokens
right before the block. So what a row is depends on its document alone, not on which passage asks
for it or what was read before; and the passages of an answer share the blocks of the candidates
that were judged for it. Blocks that were used last are kept in RAM, so passages that are asked for
often are not read again.

Source for the first tokens: Xiao et al., Efficient Streaming Language Models with Attention Sinks
(arXiv 2309.17453).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import numpy as np
from torch import Tensor

from emt.ingest.batch import BATCH_TOKENS, batches
from emt.ingest.carry import FIRST_ROWS, rotates_alike
from emt.ingest.rows import RowReader
from emt.model.attached import AttachedModel
from emt.model.references import alive
from memory_backends import MemoryBackend
from memory_backends.layout import Int64Array, StoredDocument

BLOCK = 128  # rows

_LayerParts = dict[int, tuple[Tensor, Tensor]]  # layer -> keys (Hkv, n, D), values (Hkv, n, Dv)


class _Block(NamedTuple):
    """What is read for one block.

    Attributes:
        token_ids: (T,) int64: first tokens, context and the block's own.
        places: (n,) int64, which of them are the block's rows.
    """

    token_ids: Tensor
    places: Tensor


class Rereader:
    """Gives the rows of a memory by reading their tokens: a `MemoryBackend.row_source`.

    Threads may share it.

    Args:
        model: the attached model, in evaluation mode.
        context: tokens before a block that are read with it, as far as there is room.
        max_length: tokens that are read at once of one document, at most.
        cache_bytes: how many bytes of rows are kept in RAM; the block used last always is, while
            it is in use.

    Attributes:
        num_read: tokens that the model has run so far.
        num_bytes: of the rows that are kept now.
    """

    def __init__(
        self, model: AttachedModel, context: int, max_length: int, cache_bytes: int
    ) -> None:
        self._model = model
        self._context = context
        self._max_length = max_length
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[int, _LayerParts] = OrderedDict()  # by first row; last used last
        self._lock = threading.Lock()
        self.num_read = self.num_bytes = 0

    def __call__(self, backend: MemoryBackend, ids: Tensor) -> _LayerParts:
        """Return the keys and values of rows at every layer.

        Args:
            backend: whose rows.
            ids: (...) int64 of rows that are there; -1 gives some finite numbers.

        Returns:
            Layer -> keys (Hkv, ..., D), at position 0, and values (Hkv, ..., Dv), on the CPU.

        Raises:
            MemoryUseError: the model is gone.
            DocumentError: a document was removed meanwhile.
        """
        wanted = np.unique(ids.cpu().numpy())
        blocks = self._blocks(_owners(backend, wanted[wanted >= 0]))
        if not blocks:
            return _zeros(backend, ids)
        rows = np.concatenate([np.arange(first, first + _size(blocks[first])) for first in blocks])
        places = np.searchsorted(rows, ids.reshape(-1).cpu().numpy())
        index = torch.from_numpy(places)
        joined: _LayerParts = {}
        for layer_idx in backend.layout.layers:
            of_layer = [parts[layer_idx] for parts in blocks.values()]
            key, value = (
                torch.cat(part, dim=1).index_select(1, index)
                for part in zip(*of_layer, strict=True)
            )
            joined[layer_idx] = (
                key.view(len(key), *ids.shape, -1),
                value.view(len(value), *ids.shape, -1),
            )
        return joined

    def forget(self) -> None:
        """Let go of all rows that are kept; they are read again when they are asked for."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def _blocks(self, owners: dict[int, StoredDocument]) -> dict[int, _LayerParts]:
        """Return the rows of blocks, by their first rows, which `owners` has documents of."""
        found: dict[int, _LayerParts] = {}
        with self._lock:
            for first in owners:
                if first in self._kept:
                    self._kept.move_to_end(first)
                    found[first] = self._kept[first]
        missing = [first for first in owners if first not in found]
        tokens = [self._tokens_of(owners[first], first) for first in missing]
        config = self._model.config
        most = BATCH_TOKENS if rotates_alike(config) else 0
        for batch in batches([len(block.token_ids) for block in tokens], most):
            rows = self._read([tokens[number] for number in batch])
            for number, parts in zip(batch, rows, strict=True):
                found[missing[number]] = parts
                self._keep(missing[number], parts)
        return {first: found[first] for first in owners}

    def _tokens_of(self, document: StoredDocument, first: int) -> _Block:
        """Return what is read for the block that begins with a row."""
        start = first - document.first_row
        own = document.row_tokens[start : start + BLOCK].astype(np.int64)
        room = max(self._max_length - FIRST_ROWS - (int(own[-1]) + 1 - int(own[0])), 0)
        begin = max(int(own[0]) - min(self._context, room), 0)
        kept = min(FIRST_ROWS, begin)
        token_ids = np.concatenate(
            [document.token_ids[:kept], document.token_ids[begin : int(own[-1]) + 1]]
        )
        return _Block(
            torch.from_numpy(token_ids.astype(np.int64)), torch.from_numpy(own - begin + kept)
        )

    def _read(self, blocks: Sequence[_Block]) -> Iterable[_LayerParts]:
        """Read blocks in one forward, padded on the right, where nothing sees the padding."""
        reader = RowReader(alive(self._model.decoder, "read passages"), self._model.unrotations)
        token_ids = torch.nn.utils.rnn.pad_sequence(
            [block.token_ids for block in blocks], batch_first=True
        )
        states = reader.forward(token_ids)
        self.num_read += sum(len(block.token_ids) for block in blocks)
        for number, block in enumerate(blocks):
            yield {
                layer_idx: (
                    _taken(key[number], block.places),
                    _taken(states.values[layer_idx][number], block.places),
                )
                for layer_idx, key in states.keys.items()
            }

    def _keep(self, first: int, parts: _LayerParts) -> None:
        """Keep a block, and let go of those that were not used for longest."""
        with self._lock:
            if first not in self._kept:
                self._kept[first] = parts
                self.num_bytes += _num_bytes(parts)
            while self.num_bytes > self._cache_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.num_bytes -= _num_bytes(oldest)


def _owners(backend: MemoryBackend, ids: Int64Array) -> dict[int, StoredDocument]:
    """Return the first rows of the blocks that have some rows, ascending, and their documents."""
    names = dict.fromkeys(backend.catalog.document_of_rows(ids.tolist()).values())
    documents = [backend.catalog.document(name) for name in names]
    owners: dict[int, StoredDocument] = {}
    for document in sorted(documents, key=lambda document: document.first_row):
        places = ids - document.first_row
        places = places[(places >= 0) & (places < len(document.row_tokens))]
        for block in np.unique(places // BLOCK).tolist():
            owners[document.first_row + block * BLOCK] = document
    return owners


def _zeros(backend: MemoryBackend, ids: Tensor) -> _LayerParts:
    """Return what stands for rows where all ids are -1, or there are none."""
    dtype, zeros = backend.layout.dtype, {}
    for idx, layer in backend.layout.layers.items():
        shape = layer.num_key_value_heads, *ids.shape
        key = torch.zeros(*shape, layer.head_dim, dtype=dtype)
        zeros[idx] = key, torch.zeros(*shape, layer.value_head_dim, dtype=dtype)
    return zeros


def _size(parts: _LayerParts) -> int:
    """Return how many rows a block has."""
    return next(iter(parts.values()))[0].shape[1]


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """Return a copy of some tokens' states on the CPU: (heads, T, dim) to (heads, n, dim)."""
    return states.index_select(1, places.to(states.device)).cpu()


def _num_bytes(parts: _LayerParts) -> int:
    return sum(key.nbytes + value.nbytes for key, value in parts.values())
