"""The text of an answer while its tokens come: whole characters, and nothing of a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what decoding puts in the place of bytes that are no character yet


class AnswerText:
    """Text of generated ids, in pieces that together are `content`.

    Text that may be the beginning of a stop string waits until more is known.

    Args:
        tokenizer: the model's.
        last_prompt_id: the token before the answer. It is decoded, too, since some tokenizers drop
            the space before the first token.
        stop: the text ends before the first of these strings.
        strip: leave out spaces around the text, as a chat's answers have it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        last_prompt_id: int,
        stop: Sequence[str] = (),
        *,
        strip: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._before = [last_prompt_id]
        self._text_before = self._decode(self._before)
        self._stop = stop
        self._strip = strip
        self._raw = ""  # all that was decoded, without unfinished characters
        self._ends: list[int] = []  # where each token ends in it
        self._num_sent = 0
        self.token_ids: list[int] = []
        self.is_stopped = False

    @property
    def content(self) -> str:
        """The text so far, as it was sent."""
        return self._shown()[: self._num_sent]

    @property
    def token_texts(self) -> list[str]:
        """What each token adds to `content`; of the tokens of one character the last has it."""
        first = self._first_shown()
        stop = first + self._num_sent
        ends = [min(max(end, first), stop) for end in itertools.accumulate(self._ends, max)]
        if ends:
            ends[-1] = stop
        return [self._raw[start:end] for start, end in itertools.pairwise([first, *ends])]

    def add(self, token_id: int) -> str:
        """Take a token; return the next piece of the text, which may be empty."""
        self.token_ids.append(token_id)
        piece = self._grow(self._text().rstrip(_UNFINISHED))
        self._ends.append(len(self._raw))
        return piece

    def end(self) -> str:
        """Return the last piece: what waited, characters that were never finished included."""
        return "" if self.is_stopped else self._grow(self._text(), is_end=True)

    def _grow(self, raw: str, *, is_end: bool = False) -> str:
        found = [at for at in map(raw.find, self._stop) if at >= 0]
        if found:
            raw, self.is_stopped = raw[: min(found)], True
        self._raw = raw
        shown = self._shown(num_held=0 if is_end or found else self._num_held())
        piece = shown[self._num_sent :]
        self._num_sent = max(self._num_sent, len(shown))
        return piece

    def _shown(self, num_held: int = 0) -> str:
        text = self._raw[: len(self._raw) - num_held]
        return text.strip() if self._strip else text

    def _first_shown(self) -> int:
        return len(self._raw) - len(self._raw.lstrip()) if self._strip else 0

    def _num_held(self) -> int:
        """Return how many of the last characters begin a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(self._raw)), 0, -1):
            end = self._raw[-count:]
            if any(stop.startswith(end) for stop in self._stop):
                return count
        return 0

    def _text(self) -> str:
        text = self._decode([*self._before, *self.token_ids])
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        return self._decode(self.token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
