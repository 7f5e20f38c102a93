"""Answers in the words of OpenAI's API: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from emt.serving.prompt import Answer


class Shape:
    """How OpenAI's API writes the answers of one route.

    Args:
        is_chat: messages, else texts.
        model: the model's name.
    """

    def __init__(self, *, is_chat: bool, model: str) -> None:
        self._is_chat = is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def response(
        self, answers: Sequence[Answer], usage: Mapping[str, int], **fields: Any
    ) -> dict[str, Any]:
        """Return all answers at once, each with further fields."""
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [self._whole(index, answer) | fields for index, answer in enumerate(answers)]
        return {**self._head, "object": kind, "choices": choices, "usage": dict(usage)}

    def chunk(self, choices: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        """Return a part of a stream."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": list(choices), **fields}

    def begun(self, num_answers: int) -> list[list[dict[str, Any]]]:
        """Return the choices of each chunk that says who speaks."""
        role = {"role": "assistant", "content": ""}
        parts = [self._part(index, role) for index in range(num_answers)]
        return [[part] for part in parts] if self._is_chat else []

    def piece(self, index: int, text: str) -> list[dict[str, Any]]:
        """Return the choices of a chunk with a piece of text."""
        return [self._part(index, {"content": text}, text)]

    def ended(self, index: int, answer: Answer) -> list[dict[str, Any]]:
        """Return the choices of an answer's last chunk."""
        return [self._part(index, {}) | {"finish_reason": answer.reason}]

    def _part(self, index: int, delta: Mapping[str, Any], text: str = "") -> dict[str, Any]:
        said = {"delta": dict(delta)} if self._is_chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": None}

    def _whole(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": index,
            **({"message": message} if self._is_chat else {"text": answer.text}),
            "logprobs": None,
            "finish_reason": answer.reason,
            **answer.sources.to_json(),
        }
