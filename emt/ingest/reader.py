"""How a memory has its documents read: with which model, in which windows, without which ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.errors import MemoryUseError
from emt.ingest.carry import check_carry
from emt.ingest.documents import Source, special_ids, to_document
from emt.ingest.encode import check_max_length
from emt.model.attached import AttachedModel
from emt.model.identity import weights_fingerprint
from memory_backends import Document
from memory_backends.catalog.metadata import check_metadata
from memory_backends.layout import Metadata


@dataclass(frozen=True)
class DocumentReader:
    """A model as the reader of what its memory is to remember.

    Attributes:
        model: what is known of it.
        config: the memory's settings.
        tokenizer: for text, and for the special ids.
    """

    model: AttachedModel
    config: MemoryConfig
    tokenizer: PreTrainedTokenizerBase | None

    def document(
        self,
        source: Source,
        name: str,
        *,
        max_length: int | None = None,
        metadata: Metadata | None = None,
    ) -> Document:
        """Tokenize what is to be read, and refuse what cannot be.

        Args:
            source: text or token ids; see `Memory.write`.
            name: the document's name.
            max_length: instead of the setting.
            metadata: what is known of the document.

        Raises:
            DocumentError: as `to_document`, or metadata that is not flat.
            MemoryUseError: text without a tokenizer.
            ConfigError: `max_length` is beyond the model's positions.
        """
        document = to_document(source, name, self.tokenizer, self.model.config.vocab_size)
        if metadata is not None:
            document = replace(document, metadata=check_metadata(metadata, name))
        length = min(max_length or self.config.max_length, len(document.token_ids))
        check_max_length(self.model.config, length)
        return document

    def decoder(self) -> PreTrainedModel:
        """Return the model that reads, once it is known to be ready.

        Raises:
            MemoryUseError: the model is gone, in training mode, or has other weights by now.
            ConfigError: with `carry_context`, `max_length` leaves no context to carry.
            UnsupportedModelError: with `carry_context`, the model's cannot be carried.
        """
        model, decoder = self.model.model(), self.model.decoder()
        if model is None or decoder is None:
            raise MemoryUseError("cannot write: the model is gone. Keep a reference to it.")
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
        if self.config.carry_context:
            check_carry(decoder.config, self.config.stride, self.config.max_length)
        return decoder

    @property
    def encoding(self) -> dict[str, Any]:
        """How documents are encoded: keywords of `encode`."""
        return {
            "stride": self.config.stride,
            "max_length": self.config.max_length,
            "carry_context": self.config.carry_context,
            "unrotations": self.model.unrotations,
            "drop_ids": special_ids(self.config, self.tokenizer, self.model.config),
        }

    @property
    def read_as(self) -> dict[str, Any]:
        """How documents are encoded, as plain JSON types: what their rows depend on."""
        options = self.encoding
        del options["unrotations"]
        return {**options, "drop_ids": sorted(options["drop_ids"])}
