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
from collections.abc import Mapping
from typing import NamedTuple

from emt.routing.terms import terms_of
from memory_backends import MemoryBackend, Scope

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
        self._titles: _Titles | None = None
        self._lock = threading.Lock()

    def titles_in(
        self, text: str, backend: MemoryBackend, scope: Scope | None = None
    ) -> dict[Title, list[str]]:
        """Return the titles that a text has, in its order, and the documents that have each.

        At each place the longest one counts: "New York" is not named where "New York City" is. A
        title of one word must have a capital letter if the document's name has one: "forces" do not
        name "Force.txt". Documents that are not in the scope count for nothing.
        """
        titles = self._titles_of(backend)
        words, at = terms_of(text), 0
        upper = set(terms_of(" ".join(word for word in text.split() if not word.islower())))
        found: dict[Title, list[str]] = {}
        while at < len(words):
            starts = (tuple(words[at : at + length]) for length in titles.lengths)
            named = ((start, titles.names(start, scope)) for start in starts)
            title, names = next(((title, names) for title, names in named if names), ((), []))
            if len(title) == 1 and words[at] not in upper:
                names = [name for name in names if name.rsplit("/", 1)[-1].islower()]
            if names:
                found[title] = names
            at += max(len(title), 1)
        return found

    def _titles_of(self, backend: MemoryBackend) -> _Titles:
        with self._lock:
            kept, num_changes = self._titles, backend.num_changes
            if kept is None or kept.backend is not backend or kept.num_changes != num_changes:
                known = {} if kept is None else kept.of_names
                self._titles = kept = _Titles.read(backend, num_changes, known)
            return kept


class _Titles(NamedTuple):
    """The titles of a memory as it was after so many changes.

    Attributes:
        of_names: name of a document -> its title, () for none.
        first_rows: name of a document -> its first row.
        documents: title -> the documents that have it.
        lengths: numbers of words that titles have, descending.
    """

    backend: MemoryBackend
    num_changes: int
    of_names: dict[str, Title]
    first_rows: dict[str, int]
    documents: dict[Title, list[str]]
    lengths: list[int]

    @classmethod
    def read(cls, backend: MemoryBackend, num_changes: int, known: Mapping[str, Title]) -> _Titles:
        """Read the names of a memory's documents, some of whose titles are `known`."""
        of_names: dict[str, Title] = {}
        documents: dict[Title, list[str]] = {}
        with backend.catalog.snapshot():
            names, rows = backend.catalog.document_names(), backend.catalog.first_rows().tolist()
        for name in names:
            title = known.get(name)
            of_names[name] = title = title_of(name) if title is None else title
            if title:
                documents.setdefault(title, []).append(name)
        lengths = sorted(set(map(len, documents)), reverse=True)
        return cls(
            backend, num_changes, of_names, dict(zip(names, rows, strict=True)), documents, lengths
        )

    def names(self, title: Title, scope: Scope | None) -> list[str]:
        """Return the documents of a scope that have a title."""
        names = self.documents.get(title, [])
        if scope is None:
            return names
        rows = self.first_rows
        return [
            name for name in names if any(low <= rows[name] < high for low, high in scope.spans)
        ]
