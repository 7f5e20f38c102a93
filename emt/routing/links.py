"""Links: the documents that a text names, so that what leads to another document can be followed.

A question may name one document and need another that only the first one names: "Who is the mayor
of the town where Marta lives?" Nothing in the question finds the town, but Marta's document names
it, and so does the town's own name.

Source: passages that link to others by their titles are followed in Asai et al., Learning to
Retrieve Reasoning Paths over Wikipedia Graph (arXiv 1911.10470).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

from emt.routing.terms import terms_of
from memory_backends import MemoryBackend

_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}$")

Title = tuple[str, ...]


def title_of(name: str) -> Title:
    """Return the words of a document's name, without its folders and its suffix.

    There are none in a name without a letter: numbers are in any text.
    """
    words = tuple(terms_of(_SUFFIX.sub("", name.rsplit("/", 1)[-1])))
    return words if any(char.isalpha() for word in words for char in word) else ()


class LinkIndex:
    """The titles of a memory's documents, read again when documents come or go.

    Threads may share it.
    """

    def __init__(self) -> None:
        self._titles: tuple[MemoryBackend, int, dict[str, dict[Title, list[str]]]] | None = None
        self._lock = threading.Lock()

    def named_in(self, text: str, backend: MemoryBackend, *, known: str = "") -> list[str]:
        """Return the documents that a text names, in its order, each once.

        Args:
            text: of a passage.
            backend: whose documents.
            known: a text, such as the question; what it names is left out.
        """
        titles = self._titles_of(backend)
        before = set(_titles_in(terms_of(known), titles))
        names: dict[str, None] = {}
        words = terms_of(text)
        for title in _titles_in(words, titles):
            if title not in before:
                names.update(dict.fromkeys(titles[title[0]][title]))
        return list(names)

    def _titles_of(self, backend: MemoryBackend) -> dict[str, dict[Title, list[str]]]:
        """Return the first words of titles -> titles -> names of documents."""
        with self._lock:
            kept, num_changes = self._titles, backend.num_changes
            if kept is None or kept[0] is not backend or kept[1] != num_changes:
                titles: dict[str, dict[Title, list[str]]] = {}
                for name in backend.catalog.document_names():
                    if title := title_of(name):
                        titles.setdefault(title[0], {}).setdefault(title, []).append(name)
                self._titles = kept = backend, num_changes, titles
            return kept[2]


def _titles_in(words: Sequence[str], titles: dict[str, dict[Title, list[str]]]) -> list[Title]:
    """Return the titles that words have in a row, in their order."""
    return [
        title
        for at, word in enumerate(words)
        for title in titles.get(word, ())
        if title == tuple(words[at : at + len(title)])
    ]
