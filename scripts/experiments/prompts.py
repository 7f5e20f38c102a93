"""What a model is asked: a question alone, after a text, or after chunks of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from emt.errors import ConfigError
from experiments.responder import Responder
from experiments.settings import QuestionTemplate, Settings

_BREAK = "\n\n"  # between chunks, which need not follow each other


def _has_document(template: str) -> str:
    if "{document}" not in template:
        raise ConfigError(f"expected a template with {{document}} in it; got {template!r}.")
    return template


class Templates(Settings):
    """How messages are worded.

    Attributes:
        question: with `{question}`.
        document: with `{document}` before `{question}`; of chunks too.
    """

    question: QuestionTemplate = "{question}\nAnswer in a few words."
    document: Annotated[QuestionTemplate, AfterValidator(_has_document)] = (
        "{document}\n\n{question}\nAnswer in a few words."
    )

    def of_question(self, question: str) -> str:
        """Return the message of a question alone."""
        return self.question.replace("{question}", question)

    def of_document(self, document: str, question: str) -> str:
        """Return the message of a question after a text, in which braces mean nothing."""
        parts = self.document.split("{document}")
        return document.join(part.replace("{question}", question) for part in parts)


class Prompt(NamedTuple):
    """A message, and the text in it.

    Attributes:
        message: what the model is told.
        text: what stands before the question; None if the question stands alone.
        truncated: something was left out for want of positions.
    """

    message: str
    text: str | None = None
    truncated: bool = False


def closed_book(question: str, templates: Templates) -> Prompt:
    """Ask without a text."""
    return Prompt(templates.of_question(question))


def with_document(
    document: str, question: str, responder: Responder, templates: Templates
) -> Prompt:
    """Ask after a document; one that does not fit loses its end, wherever the answer is.

    Raises:
        ConfigError: not even the question fits.
    """

    def count(text: str) -> int:
        return responder.count(templates.of_document(text, question))

    text, room = document, responder.room
    if room is not None:
        excess, length = count(text) - room, count(text) - count("")
        while excess > 0:  # again if cutting made other tokens at the seam
            length -= excess
            if length < 1:
                raise _too_long(question, room)
            text = responder.split(document, length)[0]
            excess = count(text) - room
    return Prompt(templates.of_document(text, question), text, text != document)


def with_chunks(
    chunks: Sequence[str], question: str, responder: Responder, templates: Templates
) -> Prompt:
    """Ask after chunks, the best last, next to the question; the worst that do not fit are dropped.

    Args:
        chunks: best first.
        question: what is asked.
        responder: the model.
        templates: how it is worded.

    Raises:
        ConfigError: not even the question fits.
    """
    kept = list(chunks)
    while True:
        text = _BREAK.join(chunk.strip() for chunk in reversed(kept))
        message = templates.of_document(text, question)
        if responder.room is None or responder.count(message) <= responder.room:
            return Prompt(message, text, len(kept) < len(chunks))
        if not kept:
            raise _too_long(question, responder.room)
        kept.pop()


def _too_long(question: str, room: int) -> ConfigError:
    return ConfigError(
        f"the question {question!r:.60} does not fit the {room} tokens that a prompt may have. "
        "Shorten it, or raise window."
    )
