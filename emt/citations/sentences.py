"""Documents to sentences of any script: what a citation quotes, and where a passage may end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import regex

from memory_backends import StoredDocument

# Marks that end a sentence even if no space follows: Unicode's Sentence_Terminal (UAX 44), the
# Greek question mark, and Tibetan shads, which are ends of phrases to Unicode.
_MARK = r"[[\p{Sentence_Terminal}\u037e\u0f0d-\u0f12]--[!.?\u2024]]"
_CLOSING = r"\p{Close_Punctuation}\p{Final_Punctuation}"  # brackets and quotes
_BEFORE_SPACE = _CLOSING + r"\p{Initial_Punctuation}\"'"  # these close if a space follows
# `*+` gives nothing back of what it took, so that the time is linear in the text's length.
_SENTENCE_END = regex.compile(
    rf"""(?V1x)
      [.!?] [{_BEFORE_SPACE}]*+ \s+
    | (?<=\p{{Greek}}{{2}}) ; \s+  # typed for the Greek question mark
    | \u1361{{2}} \s*+  # two Ethiopic word spaces, typed for a full stop
    | (?!\uff0e\p{{Nd}}) {_MARK} [!.?]*+  # no decimal point
      (?: [{_BEFORE_SPACE}]*+ (?=\s|\Z) | [{_CLOSING}]*+ ) (?!{_MARK}) \s*+
    | \n+
    """
)
# Where what is too long may be cut: behind spaces, Tibetan syllables, commas of other scripts.
_BREAK = regex.compile(r"(?V1)[\s\u200b\u0f0b[\p{Terminal_Punctuation}--\p{ASCII}]]")
_BLANK = regex.compile(r"[\s\x1c-\x1f]*")  # what `str.strip` takes away
_CHARACTER = regex.compile(r"\X")  # with its accents; joined emoji are one
_LOOK_BACK = 1000  # characters in which a sentence's end is looked for
_MAX_SENTENCE = 400  # characters; a longer sentence is cut at a space
_TOKENS_PER_SENTENCE = 32  # of documents that were written as ids


def sentences_of(document: StoredDocument, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Return (first token, stop token) of each sentence of a document, in order: (n, 2) int64.

    A line's end ends a sentence, too, and a long sentence is cut at a space: in scripts without
    marks, such as Thai, these are all. Of a document that was written as ids, runs of 32 tokens are
    its sentences.

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
        matches = _SENTENCE_END.finditer(text, begin, high)
        ends = [match.end() for match in matches if match.end() <= low]
        if ends:
            return ends[-1], high
        back *= 4
    return 0, high


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the first character of each sentence of a text, and the one after its last."""
    yield from itertools.pairwise([0, *_sentence_ends(text, 0, len(text))])


def _sentence_ends(text: str, start: int, final: int) -> list[int]:
    """Return where sentences end: at a mark, at a line's end, or at a space in what is too long.

    No sentence is blank: blank lines belong to what stands before them. The first sentence begins
    at `start`, and the last one ends at `final`.
    """
    ends: list[int] = []
    word = _skip_blanks(text, start, final)  # where the sentence begins, without spaces before it
    for stop in [*(match.end() for match in _SENTENCE_END.finditer(text, start, final)), final]:
        while stop - word > _MAX_SENTENCE:
            ends.append(_cut(text, word, word + _MAX_SENTENCE))
            word = _skip_blanks(text, ends[-1], final)
        if stop > word:
            ends.append(stop)
            word = _skip_blanks(text, stop, final)
        elif ends:
            ends[-1] = max(ends[-1], stop)
    return ends


def _skip_blanks(text: str, start: int, final: int) -> int:
    return int(_BLANK.match(text, start, final).end())


def _cut(text: str, start: int, stop: int) -> int:
    """Return where to cut a long sentence: after its last space, or between two characters."""
    ends = [match.end() for match in _BREAK.finditer(text, start + 1, stop)]
    if not ends:  # in a part of the text, for `\X` looks at all flags of a row before it
        part = text[start : stop + 1]
        ends = [start + match.end() for match in _CHARACTER.finditer(part)][:-1]
    return ends[-1] if ends else stop
