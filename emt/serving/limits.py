"""The bounds of what a server takes on."""

from __future__ import annotations

from dataclasses import dataclass, fields

from emt.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What one request may be, and how much may wait.

    Attributes:
        max_batch: answers that are generated together; also the largest `n`.
        max_batch_tokens: prompt and new tokens of them together, padding counted.
        max_waiting: requests that wait for the model; one more is refused with 503.
        max_seconds: from a request's arrival to the end of its answer.
        max_new_tokens: the largest `max_tokens`, and its default where the model has room.
        max_body_bytes: the largest body of a request, but for a document's.
        max_document_bytes: the largest body of a document.
        max_waiting_documents: writes that wait for others; one more is refused with 503.
        max_metadata_bytes: the most metadata of one document, as JSON.
        max_text_characters: of a document's text, in one answer.
    """

    max_batch: int = 8
    max_batch_tokens: int = 65536
    max_waiting: int = 64
    max_seconds: float = 300.0
    max_new_tokens: int = 1024
    max_body_bytes: int = 2**21
    max_document_bytes: int = 2**26
    max_waiting_documents: int = 8
    max_metadata_bytes: int = 2**14
    max_text_characters: int = 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name} must be above 0; got {value!r}.")
