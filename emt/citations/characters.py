"""Token ids to text without broken characters.

A tokenizer of bytes may spread a character over several tokens. Decoded in parts that begin or end
inside of it, the character is lost, and U+FFFD, the replacement character, stands in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex
from transformers import PreTrainedTokenizerBase

TokenIds = Sequence[int] | np.ndarray
_BROKEN = "\ufffd"
_MAX_TOKENS = 4  # of one code point: UTF-8 has at most four bytes
_REACH = 32  # tokens in which the end of a character with its accents is looked for
_CHARACTER = regex.compile(r"\X")  # with its accents; joined emoji are one


def decode_whole(
    token_ids: TokenIds, first: int, stop: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Decode tokens `first` to `stop` - 1 of a document: whole characters, without special tokens.

    A character that is spread over neighbouring parts is in the earlier one, so that these parts
    put together are the document; a part that has only the end of one character has all of it.
    """
    start, end = (_border(token_ids, at, 1, tokenizer) for at in (first, stop))
    if start >= end:
        start = _border(token_ids, first, -1, tokenizer)
    return _decode(token_ids[start:end], tokenizer).strip(_BROKEN)


def text_of_tokens(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text that each token adds to those before it; together they are the whole text.

    Of the tokens of one character the last has it, and the others are empty, as special tokens are.
    """
    texts: list[str] = []
    before: Sequence[int] = []  # decoded too, for some tokenizers drop the first space
    start = 0
    for stop in range(1, len(token_ids) + 1):
        if stop < len(token_ids) and _ends_inside(token_ids, stop, tokenizer):
            texts.append("")
            continue
        new = token_ids[start:stop]
        old, both = _decode(before, tokenizer), _decode([*before, *new], tokenizer)
        # half a character may spoil those before it
        text = both.removeprefix(old) if both.startswith(old) else _decode(new, tokenizer)
        texts.append(text)
        if text:
            before = new
        start = stop
    return texts


def _decode(token_ids: TokenIds, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(np.asarray(token_ids).tolist(), skip_special_tokens=True))


def _ends_inside(token_ids: TokenIds, stop: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the token before `stop` is inside a code point.

    It is not if any of the last tokens make up text. Each number of them is tried: bytes that begin
    inside a code point spoil those after them in some tokenizers.
    """
    return stop > 0 and all(
        _decode(token_ids[start:stop], tokenizer).endswith(_BROKEN)
        for start in range(stop - 1, max(stop - _MAX_TOKENS, 0) - 1, -1)
    )


def _code_point_border(
    token_ids: TokenIds, at: int, step: int, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Return the nearest place from `at` on, in steps of 1 or -1, that is inside no code point."""
    at = min(max(at, 0), len(token_ids))
    for place in range(at, at + step * _MAX_TOKENS, step):
        if place in (0, len(token_ids)) or not _ends_inside(token_ids, place, tokenizer):
            return place
    return at


def _is_border(token_ids: TokenIds, at: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether no character, with its accents, is on both sides of `at`."""
    if at in (0, len(token_ids)):
        return True
    if _ends_inside(token_ids, at, tokenizer):
        return False
    start = _code_point_border(token_ids, at - _REACH, -1, tokenizer)
    stop = _code_point_border(token_ids, at + 1, 1, tokenizer)
    before, after = (_decode(part, tokenizer) for part in (token_ids[start:at], token_ids[at:stop]))
    ends = [match.end() for match in _CHARACTER.finditer(before + after)]
    return not before or not after or len(before) in ends


def _border(token_ids: TokenIds, at: int, step: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the nearest place from `at` on, in steps of 1 or -1, between two characters."""
    for place in range(at, at + step * _REACH, step):
        if 0 <= place <= len(token_ids) and _is_border(token_ids, place, tokenizer):
            return place
    return at
