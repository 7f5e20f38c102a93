"""Documents to sentences: what a citation quotes, and where a passage may end."""

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
_MAX_SENTENCE = 400  # characters; a longer sentence is cut at a space
_TOKENS_PER_SENTENCE = 32  # of documents that were written as ids


def sentences_of(document: StoredDocument, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Return (first token, stop token) of each sentence of a document, in order: (n, 2) int64.

    A line's end ends a sentence, too; a long sentence is cut at a space; of a document that was
    written as ids, runs of 32 tokens are its sentences.

    Args:
        document: of text, or of ids.
        first: the first token to look at; a sentence that it is in the middle of begins with it.
        stop: one after the last token to look at, likewise; None for the document's last.
    """
    stop = len(document.token_ids) if stop is None else stop
    if document.text is None or document.offsets is None:
        begin = -(-first // _TOKENS_PER_SENTENCE) * _TOKENS_PER_SENTENCE
        starts = np.arange(begin, stop, _TOKENS_PER_SENTENCE)
        starts = starts if begin == first else np.append(first, starts)
    else:
        spans = document.offsets[first:stop]
        ends = np.array(_sentence_ends(document.text, *_characters(spans, document.text)))
        # A token belongs to the sentence that its last character is in; a special token, which
        # stands nowhere in the text, to that of the token before it.
        sentence = np.searchsorted(ends, spans[:, 1], side="left")
        stands = spans[:, 1] > spans[:, 0]
        sentence = np.where(stands, sentence, sentence[stands].min(initial=len(ends)))
        sentence = np.maximum.accumulate(sentence)
        starts = first + np.flatnonzero(np.diff(sentence, prepend=-1))
    return np.stack([starts, np.append(starts[1:], stop)], axis=1)


def _characters(spans: np.ndarray, text: str) -> tuple[int, int]:
    """Return where to begin and to end with finding sentences, for tokens at some places of a text.

    What is too long is cut at the same spaces as in the whole text: it begins with the end of the
    sentence before these tokens, and sees more than a sentence behind them.
    """
    stands = spans[spans[:, 1] > spans[:, 0]]
    if not len(stands):
        return 0, 0
    low, high = int(stands[0, 0]), min(int(stands[-1, 1]) + _MAX_SENTENCE + 1, len(text))
    back = _LOOK_BACK
    while (begin := max(low - back, 0)) > 0:
        ends = [match.end() for match in _SENTENCE_END.finditer(text, begin, low)]
        if ends:
            return ends[-1], high
        back *= 4
    return 0, high


def _sentence_ends(text: str, start: int, final: int) -> list[int]:
    """Return where sentences end: at a mark, at a line's end, or at a space in what is too long.

    No sentence is blank: blank lines belong to what stands before them. The first sentence begins
    at `start`, and the last one ends at `final`.
    """
    ends: list[int] = []

    def end_at(stop: int) -> None:
        nonlocal start
        if not text[start:stop].isspace():
            ends.append(stop)
        elif ends:
            ends[-1] = stop
        else:
            return  # before the first sentence, and so part of it
        start = stop

    for stop in [*(match.end() for match in _SENTENCE_END.finditer(text, start, final)), final]:
        while stop - start > _MAX_SENTENCE:
            before = start
            end_at(_cut(text, start, start + _MAX_SENTENCE))
            if start == before:  # hundreds of spaces before the first word
                break
        if stop > start:
            end_at(stop)
    return ends


def _cut(text: str, start: int, stop: int) -> int:
    """Return where to cut a long sentence: after its last space, or between two characters."""
    space = text.rfind(" ", start + 1, stop)
    if space > start:
        return space + 1
    for cut in range(stop, start + 1, -1):
        is_mark = unicodedata.category(text[cut])[0] == "M"  # an accent, or an emoji's variation
        if not is_mark and "\u200d" not in text[cut - 1 : cut + 1]:  # a zero-width joiner
            return cut
    return stop
