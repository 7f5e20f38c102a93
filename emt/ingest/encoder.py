"""Documents to rows: check that a document and its model can be encoded, and encode it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.errors import MemoryUseError, UnsupportedModelError
from emt.ingest.batch import encode_group, groups
from emt.ingest.carry import can_carry, check_carry, encode_carrying, rotates_alike
from emt.ingest.documents import Source, special_ids, to_document
from emt.ingest.rows import RowReader
from emt.ingest.sinks import SinkFinder
from emt.ingest.windows import Windows, check_max_length
from emt.model.attached import AttachedModel
from emt.model.identity import weights_fingerprint
from emt.model.references import alive
from memory_backends import Document, Rows
from memory_backends.catalog.metadata import check_metadata
from memory_backends.layout import Metadata


@dataclass(frozen=True)
class Encoder:
    """An attached model that encodes documents; the tokenizer is for text and special ids."""

    model: AttachedModel
    config: MemoryConfig
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def windows(self) -> Windows:
        """How documents are cut; "auto" is left of `carry_context` where it may be possible."""
        windows = Windows.of(self.config, self.model.config)
        if windows.carry_context == "auto" and not can_carry(self.model.config, windows):
            return replace(windows, carry_context=False)
        return windows

    @property
    def drop_ids(self) -> frozenset[int]:
        """The token ids that leave no rows."""
        return frozenset(special_ids(self.config, self.tokenizer, self.model.config))

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the model that rows depend on, as plain JSON types."""
        windows = self.windows
        return {
            "stride": windows.stride,
            "max_length": windows.max_length,
            "carry_context": windows.carry_context,
            "drop_ids": sorted(self.drop_ids),
        }

    def document(self, source: Source, name: str, *, metadata: Metadata | None = None) -> Document:
        """Tokenize a document, and refuse one that cannot be encoded; see `Memory.write`.

        Raises:
            DocumentError: as `to_document`, or metadata that is not flat.
            MemoryUseError: text without a tokenizer.
            ConfigError: `max_length` is beyond the model's positions.
        """
        document = to_document(source, name, self.tokenizer, self.model.config.vocab_size)
        if metadata is not None:
            document = replace(document, metadata=check_metadata(metadata, name))
        check_max_length(self.model.config, min(self.windows.max_length, len(document.token_ids)))
        return document

    def encode(self, document: Document) -> Iterator[Rows]:
        """Return the rows of a document; see `encode` below, and `row_reader` for errors."""
        return encode(self.row_reader(), _ids(document), self.windows)

    def encode_all(
        self, documents: Iterable[Document]
    ) -> Iterator[tuple[Document, Iterator[Rows]]]:
        """Return documents with their rows; see `encode_all` below, and `row_reader` for errors."""
        return encode_all(self.row_reader(), documents, self.windows)

    def row_reader(self) -> RowReader:
        """Return the model as a reader of rows, if it is ready to be one.

        Raises:
            MemoryUseError: the model is gone, in training mode, or has other weights by now.
            ConfigError: with `carry_context`, `max_length` leaves no room for context.
            UnsupportedModelError: with `carry_context`, a layer keeps more than keys and values.
        """
        model, decoder = alive(self.model.model, "write"), alive(self.model.decoder, "write")
        if decoder.training:
            raise MemoryUseError(
                "documents must be read in evaluation mode; the model is in training mode. "
                "Call model.eval()."
            )
        if weights_fingerprint(model) != self.model.identity.get("weights"):
            raise MemoryUseError(
                "the model's weights have changed since attach(), by training or by an adapter: "
                "the memory would mix rows of two models. detach(), and attach() again."
            )
        if self.windows.carry_context is True:
            check_carry(decoder.config, self.windows)
        return RowReader(decoder, self.model.unrotations, self.drop_ids)


def encode(reader: RowReader, token_ids: Tensor, windows: Windows) -> Iterator[Rows]:
    """Yield the rows of one document, (T,) int64, window by window; the model runs meanwhile.

    With `carry_context` "auto", a model whose first window shows that its context cannot be carried
    reads each window anew.

    Raises:
        ConfigError, UnsupportedModelError: the context cannot be carried; see `encode_carrying`.
    """
    if windows.carry_context:
        carried = encode_carrying(reader, token_ids, windows)
        try:
            first = next(carried)
        except UnsupportedModelError:
            if windows.carry_context is True:
                raise
        else:
            yield first
            yield from carried
            return
    sinks = SinkFinder()
    for start, stop, keep_from in windows.cut(len(token_ids)):
        states = reader.forward(token_ids[None, start:stop], skip=keep_from - start)
        kept = token_ids[keep_from:stop]
        yield reader.rows(states, kept, sinks=sinks, first_token=keep_from)


def encode_all(
    reader: RowReader, documents: Iterable[Document], windows: Windows
) -> Iterator[tuple[Document, Iterator[Rows]]]:
    """Yield each document with its rows, in order; short ones, of one window, share forwards.

    Documents are read ahead as far as they are short, `BATCH_TOKENS` tokens at most. If the stream
    raises, the documents before the error are yielded first. The model runs when rows are taken;
    take them all before the next document.
    """
    longest = windows.max_length if rotates_alike(reader.decoder.config) else 0
    for group in groups(documents, longest):
        if len(group) == 1:
            yield group[0], encode(reader, _ids(group[0]), windows)
        else:
            yield from encode_group(reader, group)


def _ids(document: Document) -> Tensor:
    return torch.from_numpy(document.token_ids).long()
