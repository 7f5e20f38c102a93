"""What a model is asked: a question alone, after a document, or after chunks of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emt.errors import ConfigError
from experiments.items import Item
from experiments.retrieval.answering import Responder

_BREAK = "\n\n"  # between chunks, which need not follow each other


@dataclass(frozen=True)
class Templates:
    """How messages are worded.

    Attributes:
        question: with `{question}`.
        document: with `{document}` before `{question}`; of chunks too.

    Raises:
        ConfigError: a place is missing.
    """

    question: str = "{question}\nAnswer in a few words."
    document: str = "{document}\n\n{question}\nAnswer in a few words."

    def __post_init__(self) -> None:
        for name, places in (("question", ("question",)), ("document", ("document", "question"))):
            template = getattr(self, name)
            for place in places:
                if not isinstance(template, str) or "{" + place + "}" not in template:
                    raise ConfigError(
                        f"template '{name}' must have {{{place}}} in it; got {template!r}."
                    )

    def of_question(self, question: str) -> str:
        """Return the message of a question alone."""
        return self.question.replace("{question}", question)

    def of_document(self, document: str, question: str) -> str:
        """Return the message of a question after a text, in which braces mean nothing."""
        before, _, after = self.document.partition("{document}")
        return (
            before.replace("{question}", question)
            + document
            + after.replace("{question}", question)
        )


@dataclass(frozen=True)
class Prompt:
    """A message, and what became of the document in it.

    Attributes:
        message: what the model is told.
        truncated: something was left out for want of positions.
        has_answer: the text before the question still has the answer; None if there is no text.
    """

    message: str
    truncated: bool = False
    has_answer: bool | None = None


def closed_book(item: Item, templates: Templates) -> Prompt:
    """Ask without the document."""
    return Prompt(templates.of_question(item.question))


def with_document(item: Item, responder: Responder, templates: Templates) -> Prompt:
    """Ask after the document; one that does not fit loses its end, wherever the answer is.

    Raises:
        ConfigError: not even the question fits.
    """
    text, truncated = item.context, False
    room = responder.room
    if room is not None:
        message = templates.of_document(text, item.question)
        excess = responder.count(message) - room
        length = responder.count(message) - responder.count(
            templates.of_document("", item.question)
        )
        while excess > 0:  # again if cutting made other tokens at the seam
            truncated = True
            length -= excess
            if length < 1:
                raise _too_long(item, room)
            text = responder.split(item.context, length)[0]
            excess = responder.count(templates.of_document(text, item.question)) - room
    message = templates.of_document(text, item.question)
    return Prompt(message, truncated, _has(text, item.answer))


def with_chunks(
    item: Item, chunks: Sequence[str], responder: Responder, templates: Templates
) -> Prompt:
    """Ask after chunks, the best last, next to the question; the worst that do not fit are dropped.

    Args:
        item: whose question is asked.
        chunks: best first.
        responder: who is asked.
        templates: how it is worded.

    Raises:
        ConfigError: not even the question fits.
    """
    kept = list(chunks)
    while True:
        text = _BREAK.join(chunk.strip() for chunk in reversed(kept))
        message = templates.of_document(text, item.question)
        if responder.room is None or responder.count(message) <= responder.room:
            return Prompt(message, len(kept) < len(chunks), _has(text, item.answer))
        if not kept:
            raise _too_long(item, responder.room)
        kept.pop()


def _has(text: str, answer: str) -> bool:
    return answer.lower() in text.lower()


def _too_long(item: Item, room: int) -> ConfigError:
    return ConfigError(
        f"the question of item '{item.id}' does not fit the {room} tokens that a prompt may have. "
        "Shorten it, or raise window."
    )
