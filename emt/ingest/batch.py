"""Batches of short documents: each is read on its own, and several share a forward.

Documents that fit into one window are padded on the right. A causal model's tokens see nothing to
the right of them, so no mask is needed. At most `BATCH_TOKENS` tokens are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from emt.ingest.rows import RowReader
from emt.ingest.sinks import SinkFinder
from memory_backends import Document, Rows

BATCH_TOKENS = 4096
_MAX_PADDING = 1.25  # tokens run for each token of a document, at most


def groups(documents: Iterable[Document], longest: int) -> Iterator[list[Document]]:
    """Cut a stream into lists of short documents, `BATCH_TOKENS` tokens at most, and long ones.

    A document of more than `longest` tokens is a list of its own. If the stream raises, the
    documents before the error are yielded first.
    """
    group: list[Document] = []
    tokens = 0
    try:
        for document in documents:
            length = len(document.token_ids)
            if group and (length > longest or tokens + length > BATCH_TOKENS):
                yield group
                group, tokens = [], 0
            if length > longest:
                yield [document]
            else:
                group.append(document)
                tokens += length
    except Exception:  # the documents before the error come first
        if group:
            yield group
        raise
    if group:
        yield group


def encode_group(
    reader: RowReader, documents: Sequence[Document]
) -> Iterator[tuple[Document, Iterator[Rows]]]:
    """Yield short documents with their rows, in order; those of similar lengths share a forward.

    The model runs when rows are taken.
    """
    token_ids = [torch.from_numpy(document.token_ids).long() for document in documents]
    batch_of = {
        number: batch for batch in batches([len(ids) for ids in token_ids]) for number in batch
    }
    encoded: dict[int, Rows] = {}

    def rows(number: int) -> Iterator[Rows]:
        if number not in encoded:
            batch = batch_of[number]
            together = encode_batch(reader, [token_ids[member] for member in batch])
            encoded.update(zip(batch, together, strict=True))
        yield encoded.pop(number)

    for number, document in enumerate(documents):
        yield document, rows(number)


def batches(lengths: Sequence[int], most_tokens: float = math.inf) -> list[list[int]]:
    """Put documents of similar lengths together, as lists of indices: little is padding then.

    A list of more than one has at most `most_tokens` tokens, with padding.
    """
    result: list[list[int]] = []
    longest = tokens = 0  # of the last batch
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        padded = (len(result[-1]) + 1) * longest if result else math.inf
        if padded <= min(_MAX_PADDING * (tokens + length), most_tokens):
            result[-1].append(number)
            tokens += length
        else:
            result.append([number])
            longest = tokens = length
    return result


def encode_batch(reader: RowReader, token_ids: Sequence[Tensor]) -> list[Rows]:
    """Return the rows of several documents, each (T,) int64, from one forward."""
    padded = torch.nn.utils.rnn.pad_sequence(list(token_ids), batch_first=True)  # (B, T)
    states = reader.forward(padded)
    return [
        reader.rows(states, ids, sinks=SinkFinder(), sequence=sequence)
        for sequence, ids in enumerate(token_ids)
    ]
