"""Documents to passages: the sentences or lines that a citation quotes."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from memory_backends import StoredDocument

_SENTENCE_END = re.compile(
    r"(?<=[.!?])[\"'\u201d\u2019)\]]*\s+"
    r"|(?<=[\u3002\uff01\uff1f])[\u201d\u2019\u300d\u300f\uff09]*"  # Chinese and Japanese
    r"|\n+"
)
_MAX_PASSAGE = 400  # characters; a longer sentence is cut at a space
_TOKENS_PER_PASSAGE = 32  # of documents that were written as ids


def passages_of(document: StoredDocument) -> np.ndarray:
    """Return (first token, stop token) of each passage of a document, in order: (P, 2)."""
    num_tokens = len(document.token_ids)
    spans = document.offsets
    if document.text is None or spans is None:
        starts = np.arange(0, num_tokens, _TOKENS_PER_PASSAGE)
    else:
        ends = np.array(_passage_ends(document.text))
        # A token belongs to the passage that its last character is in; a special token, which
        # stands nowhere in the text, to that of the token before it.
        passage = np.searchsorted(ends, spans[:, 1], side="left")
        stands = spans[:, 1] > spans[:, 0]
        passage = np.where(stands, passage, passage[stands].min(initial=len(ends)))
        passage = np.maximum.accumulate(passage)
        starts = np.flatnonzero(np.diff(passage, prepend=-1))
    return np.stack([starts, np.append(starts[1:], num_tokens)], axis=1)


def _passage_ends(text: str) -> list[int]:
    """Return where passages end: at sentences, lines, or a space in what is too long.

    No passage is blank: blank lines belong to what stands before them.
    """
    ends: list[int] = []
    start = 0

    def end_at(stop: int) -> None:
        nonlocal start
        if not text[start:stop].isspace():
            ends.append(stop)
        elif ends:
            ends[-1] = stop
        else:
            return  # before the first passage, and so part of it
        start = stop

    for stop in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        while stop - start > _MAX_PASSAGE:
            before = start
            end_at(_cut(text, start, start + _MAX_PASSAGE))
            if start == before:  # hundreds of spaces before the first word
                break
        if stop > start:
            end_at(stop)
    return ends


def _cut(text: str, start: int, stop: int) -> int:
    """Return where to cut a long passage: after its last space, or between two characters."""
    space = text.rfind(" ", start + 1, stop)
    if space > start:
        return space + 1
    cut = stop
    while (
        cut > start + 1
        and (
            unicodedata.category(text[cut])[0] == "M"  # an accent, or a variation of an emoji
            or "\u200d" in text[cut - 1 : cut + 1]  # a zero-width joiner
        )
    ):
        cut -= 1
    return stop if cut == start + 1 else cut
