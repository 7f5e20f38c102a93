"""A generated text in the pieces in which it comes, whole characters each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\ufffd"  # what decoding puts in the place of bytes that are no character yet


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Return the text of generated ids, without special tokens and without spaces around it."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


class TextPieces(BaseStreamer):
    """A streamer of `generate` for one sequence; the pieces together are `text_of` its ids.

    Unlike transformers' `TextStreamer`, it does not wait for the end of a word, which a text in
    Thai or Japanese may not have; and it decodes all ids each time, since a tokenizer may drop
    the space before the first.

    Args:
        tokenizer: the model's.
        on_text: called with each piece.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]
    ) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._token_ids: list[int] | None = None  # None before the prompt
        self._num_sent = 0  # characters

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, T), and then each new token, (1,)."""
        if self._token_ids is None:
            self._token_ids = []
            return
        self._token_ids += value.tolist()
        self._send(text_of(self._tokenizer, self._token_ids).rstrip(_UNFINISHED).rstrip())

    def end(self) -> None:
        """Send what is left, characters that were never finished included."""
        self._send(text_of(self._tokenizer, self._token_ids or []))

    def _send(self, text: str) -> None:
        piece = text[self._num_sent :]
        if piece:
            self._num_sent = len(text)
            self._on_text(piece)
