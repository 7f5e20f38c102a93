"""The words of a text, as BM25 compares them: in any script, whatever their case and accents.

Of scripts without spaces between words, these are all characters, and all pairs of neighbours.

Source: pairs are what Lucene's CJK analyzer takes. Characters beside them: Nie et al., On the Use
of Words and N-grams for Chinese Information Retrieval (IRAL 2000).
"""

from __future__ import annotations

import functools
import re
import unicodedata

# Blocks of these scripts. Korean has spaces, but joins its particles to the words.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u1100-\u11ff\u3130-\u318f\uac00-\ud7ff"  # Hangul
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Kana
    "\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
# Accents, and the points of Hebrew and Arabic, which writers may leave out.
_OPTIONAL = re.compile("[\u0300-\u036f\u0591-\u05c7\u0640\u064b-\u0655\u0670]")
# Lucene's for English, and what an apostrophe leaves behind.
_ENGLISH = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with s t"
)
_STOP_WORDS = frozenset(_ENGLISH.split())


def terms_of(text: str) -> list[str]:
    """Return the words of a text in order, English stop words left out."""
    words: list[str] = []
    before, end = "", -1  # the last character of an unspaced script, and where it ended
    for match in _pattern().finditer(_folded(text)):
        word = match.group()
        if match.lastindex:
            if match.start() == end:
                words.append(before + word)
            before, end = word, match.end()
        if word not in _STOP_WORDS:
            words.append(_singular(word))
    return words


def _folded(text: str) -> str:
    """Return a text without case, accents, and variants of characters."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = _OPTIONAL.sub("", unicodedata.normalize("NFKD", folded))
    return unicodedata.normalize("NFC", folded)


@functools.lru_cache(maxsize=1 << 16)
def _singular(word: str) -> str:
    """Return a word without the s of a plural or of a verb.

    Source: Harman, How Effective Is Suffixing? (1991), the S stemmer.
    """
    if not word.isascii() or len(word) < 4 or word.endswith(("us", "ss")):
        return word
    if word.endswith("ies") and word[-4] not in "ae":
        return word[:-3] + "y"
    return word.removesuffix("s")


@functools.cache
def _pattern() -> re.Pattern[str]:
    """Return what matches a word; or, as its group, one character of an unspaced script."""
    # To `re` the vowel signs of Hindi, which are marks, are no part of a word.
    everything = map(chr, range(0x300, 0x20000))
    marks = "".join(char for char in everything if unicodedata.category(char)[0] == "M")
    letters = rf"[^\W_{_UNSPACED}]+"
    return re.compile(rf"([{_UNSPACED}][{marks}]*)|{letters}(?:[{marks}]+(?:{letters})?)*")
