"""Many documents to rows: short ones share a forward, and come out in the order they came in.

Documents that fit into one window are read together, padded on the right: a causal model cannot
see the padding from the left of it, so no mask is needed. Only the next few documents are looked
at, `BATCH_TOKENS` in all, and their rows are what is held at a time, however many follow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from emt.ingest.encode import encode
from emt.ingest.rows import Reader
from emt.model.rope import Unrotation
from memory_backends import Document, Rows

BATCH_TOKENS = 4096
_PADDED = 1.25  # tokens run for each token read, at most


def encode_all(
    decoder: PreTrainedModel,
    documents: Iterable[Document],
    *,
    stride: int,
    max_length: int,
    unrotations: Mapping[int, Unrotation | None],
    drop_ids: Collection[int] = (),
    carry_context: bool = False,
) -> Iterator[tuple[Document, Iterator[Rows]]]:
    """Read documents, each on its own, short ones at the same time.

    Args:
        decoder: the model without its language-model head, attached or being attached.
        documents: read as far ahead as there are short ones, `BATCH_TOKENS` tokens at most. If it
            raises, what came before is handed out first.
        stride: as in `encode`, like all that follow.

    Yields:
        Each document with its rows, in order. The model runs when rows are taken; take them all
        before the next document.
    """
    longest = max_length if _rotates_alike(decoder.config) else 0
    for group in _groups(documents, longest):
        ids = [torch.from_numpy(document.token_ids).long() for document in group]
        if len(group) == 1:
            rows = encode(
                decoder,
                ids[0],
                stride=stride,
                max_length=max_length,
                unrotations=unrotations,
                drop_ids=drop_ids,
                carry_context=carry_context,
            )
            yield group[0], rows
        else:
            together = _Together(Reader(decoder, unrotations, drop_ids), ids)
            for at, document in enumerate(group):
                yield document, together.rows(at)


def encode_batch(reader: Reader, token_ids: Sequence[Tensor]) -> list[Rows]:
    """Read several documents in one forward.

    Args:
        reader: the model.
        token_ids: of each document, (T,) int64.

    Returns:
        The rows of each.
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(token_ids), batch_first=True)  # (B, T)
    reading = reader.read(padded)
    return [
        reader.rows(reading, ids, first_token=0, num_before=0, sequence=sequence)
        for sequence, ids in enumerate(token_ids)
    ]


class _Together:
    """A group of short documents, of which similarly long ones are read in one forward."""

    def __init__(self, reader: Reader, token_ids: Sequence[Tensor]) -> None:
        self._reader = reader
        self._token_ids = token_ids
        self._batch_of = {
            at: batch for batch in batches([len(ids) for ids in token_ids]) for at in batch
        }
        self._read: dict[int, Rows] = {}

    def rows(self, at: int) -> Iterator[Rows]:
        """Yield a document's rows; once."""
        if at not in self._read:
            batch = self._batch_of[at]
            found = encode_batch(self._reader, [self._token_ids[other] for other in batch])
            self._read.update(zip(batch, found, strict=True))
        yield self._read.pop(at)


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Put documents of similar lengths together, so that little of a batch is padding.

    Args:
        lengths: tokens of each document.

    Returns:
        Indices of `lengths`, batch by batch.
    """
    found: list[list[int]] = []
    tokens = 0
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if found and len(found[-1] + [at]) * lengths[found[-1][0]] <= _PADDED * (
            tokens + lengths[at]
        ):
            found[-1].append(at)
            tokens += lengths[at]
        else:
            found.append([at])
            tokens = lengths[at]
    return found


def _groups(documents: Iterable[Document], longest: int) -> Iterator[list[Document]]:
    """Cut a stream into lists of short documents, and long ones alone.

    Args:
        documents: the stream; what it raises is raised after the documents before it.
        longest: tokens of a short document.
    """
    group: list[Document] = []
    tokens = 0
    failure: Exception | None = None
    stream = iter(documents)
    while True:
        try:
            document = next(stream, None)
        except Exception as error:
            document, failure = None, error
        length = 0 if document is None else len(document.token_ids)
        if group and (document is None or length > longest or tokens + length > BATCH_TOKENS):
            yield group
            group, tokens = [], 0
        if failure is not None:
            raise failure
        if document is None:
            return
        group.append(document)
        tokens += length
        if length > longest:
            yield group
            group, tokens = [], 0


def _rotates_alike(config: PreTrainedConfig) -> bool:
    """Tell whether a token's rotation does not depend on how long the longest of a batch is."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(part for part in found.values() if isinstance(part, dict))]
    return not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
