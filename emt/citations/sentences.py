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
_LOOK_BACK = 1000  # characters in which a sentence's end is looked for
_MAX_PASSAGE = 400  # characters; a longer sentence is cut at a space
_TOKENS_PER_PASSAGE = 32  # of documents that were written as ids


def passages_of(document: StoredDocument, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Return (first token, stop token) of each passage of a document, in order: (P, 2).

    Args:
        document: the document.
        first: the first token to look at; a passage that it is in the middle of begins with it.
        stop: one after the last token to look at, likewise; None for the document's last.
    """
    stop = len(document.token_ids) if stop is None else stop
    if document.text is None or document.offsets is None:
        begin = -(-first // _TOKENS_PER_PASSAGE) * _TOKENS_PER_PASSAGE
        starts = np.arange(begin, stop, _TOKENS_PER_PASSAGE)
        starts = starts if begin == first else np.append(first, starts)
    else:
        spans = document.offsets[first:stop]
        ends = np.array(_passage_ends(document.text, *_characters(spans, document.text)))
        # A token belongs to the passage that its last character is in; a special token, which
        # stands nowhere in the text, to that of the token before it.
        passage = np.searchsorted(ends, spans[:, 1], side="left")
        stands = spans[:, 1] > spans[:, 0]
        passage = np.where(stands, passage, passage[stands].min(initial=len(ends)))
        passage = np.maximum.accumulate(passage)
        starts = first + np.flatnonzero(np.diff(passage, prepend=-1))
    return np.stack([starts, np.append(starts[1:], stop)], axis=1)


def _characters(spans: np.ndarray, text: str) -> tuple[int, int]:
    """Return where to begin and to end with finding sentences, for tokens at some places of a text.

    What is too long is cut at the same spaces as in the whole text: it begins with the end of the
    sentence before these tokens, and sees more than a passage behind them.
    """
    stands = spans[spans[:, 1] > spans[:, 0]]
    if not len(stands):
        return 0, 0
    low, high = int(stands[0, 0]), min(int(stands[-1, 1]) + _MAX_PASSAGE + 1, len(text))
    back = _LOOK_BACK
    while (begin := max(low - back, 0)) > 0:
        ends = [match.end() for match in _SENTENCE_END.finditer(text, begin, low)]
        if ends:
            return ends[-1], high
        back *= 4
    return 0, high


def _passage_ends(text: str, start: int, final: int) -> list[int]:
    """Return where passages end: at sentences, lines, or a space in what is too long.

    No passage is blank: blank lines belong to what stands before them.

    Args:
        text: the text.
        start: where the first passage begins.
        final: where the last one ends.
    """
    ends: list[int] = []

    def end_at(stop: int) -> None:
        nonlocal start
        if not text[start:stop].isspace():
            ends.append(stop)
        elif ends:
            ends[-1] = stop
        else:
            return  # before the first passage, and so part of it
        start = stop

    for stop in [*(match.end() for match in _SENTENCE_END.finditer(text, start, final)), final]:
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
