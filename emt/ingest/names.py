"""Names of documents, and the file that each came from, so that two files never share a name.

A document is named by its file's path below the folder that was given, a line of a .jsonl file by
its "id". Where another file's document has that name, as many parts of the path as it takes come
before it: `lantern/notes.md`. A file that was read before keeps the names that its documents have.
A store keeps the files of its documents as a setting: absolute path -> names.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Self

import numpy as np

from emt.errors import CorpusError
from emt.ingest.files import SourceFile
from emt.ingest.reading import TextDocument
from memory_backends import Document, content_hash
from memory_backends.catalog import FILE_NAME, Catalog

_SETTING = "files"


def files_of_documents(catalog: Catalog) -> dict[str, str]:
    """Return document -> absolute path of its file, of those in a store whose file is known."""
    files = catalog.setting(_SETTING) or {}
    return {name: location for location, names in files.items() for name in names}


class DocumentNames:
    """Names the documents of files, beside those that a store has.

    Args:
        files: document -> absolute path of its file, of those that are in the store.
        hashes: document -> `content_hash`, of all that are in the store.
        replace: take a document of the same name for the same one, whichever file it came from.

    Attributes:
        lengthened: the names that were made longer because another file's document had them.
    """

    def __init__(
        self, files: Mapping[str, str], hashes: Mapping[str, str], *, replace: bool = False
    ) -> None:
        self._files = {name: files[name] for name in files if name in hashes}
        self._hashes = hashes
        self._replace = replace
        self._names: dict[str, list[str]] = defaultdict(list)  # location -> documents
        for name, location in self._files.items():
            self._names[location].append(name)
        self._given: dict[str, tuple[str, str]] = {}  # name -> location and key
        self._names_of: dict[tuple[str, str], str] = {}  # location and key -> name
        self._new: dict[str, str] = {}  # names that are new for their file -> content hash
        self.lengthened: list[str] = []

    @classmethod
    def of_store(cls, store: Path, *, replace: bool = False) -> Self:
        """Return the names of a store's documents; of none if there is no store."""
        if not (store / FILE_NAME).is_file():
            return cls({}, {})
        with contextlib.closing(Catalog.open(store)) as catalog:
            files, hashes = files_of_documents(catalog), catalog.content_hashes()
        return cls(files, hashes, replace=replace)

    def name_of(self, document: TextDocument) -> str:
        """Return the name of a document, the same each time.

        Raises:
            CorpusError: every name that it could have is taken.
        """
        place = document.file.location, document.key
        if place not in self._names_of:
            self._names_of[place] = name = self._choose(document, place)
            self._given[name] = place
            if self._files.get(name) != document.file.location:
                self._new[name] = _hash_of(document.text)
        return self._names_of[place]

    def check_still_free(self, document: TextDocument, catalog: Catalog) -> None:
        """Raise a CorpusError if another process has given a document's name to another one since.

        Names are chosen before the store is locked, and writing would replace that document.
        """
        name = document.name
        if self._replace or name in self._hashes:
            return
        if catalog.content_hash(name) not in (None, self._new.get(name)):
            raise CorpusError(
                f"another process has written another document '{name}' meanwhile. Start the same "
                "command again: it gives this one another name, and goes on."
            )

    def keep(self, catalog: Catalog) -> None:
        """Keep in a store which file its documents came from."""
        files: dict[str, list[str]] = defaultdict(list)
        present = catalog.content_hashes()
        given = {
            name: location
            for name, (location, _) in self._given.items()
            if name not in self._new or self._new[name] == present.get(name)
        }  # what was not written, for an error of its own or one before, is no document of the file
        for name, location in sorted({**files_of_documents(catalog), **given}.items()):
            if name in present:
                files[location].append(name)
        if files != (catalog.setting(_SETTING) or {}):
            catalog.set_setting(_SETTING, files)

    def gone(self, folders: Iterable[str], unread: Iterable[str]) -> list[str]:
        """Return the documents whose file, or line of a file, is gone.

        Args:
            folders: absolute paths of the folders to look into. Files whose documents were named
                are looked into, too.
            unread: absolute paths of what could not be read: the documents below them stay.
        """
        roots = {root for folder in folders for root in (folder, os.path.realpath(folder))}
        unread = set(unread)
        read = {location for location, _ in self._given.values()}
        gone = []
        for name, location in self._files.items():
            if name in self._given or _is_under(location, unread):
                continue
            places = location, os.path.realpath(location)
            is_inside = any(_is_under(place, roots) for place in places)
            if location in read or (is_inside and _is_missing(location)):
                gone.append(name)
        return gone

    def _choose(self, document: TextDocument, place: tuple[str, str]) -> str:
        """Return the name that the document has in the store, else the first that is free."""
        stored = [name for name in self._stored_names(document.file) if name not in self._given]
        if stored and document.file.path.suffix.lower() != ".jsonl":
            return stored[0]
        candidates = list(_candidates(document))
        for name in candidates:
            if name in stored:
                return name
        for name in candidates:
            if name not in self._given and self._is_free(name, document.text):
                if name != document.key and name not in self._hashes:
                    self.lengthened.append(name)
                return name
        raise CorpusError(
            f"{document.origin} has no name of its own: the store has other documents of each name "
            f"from '{candidates[0]}' to '{candidates[-1]}'. Remove one, or rename the file."
        )

    def _is_free(self, name: str, text: str) -> bool:
        """Tell whether no other file's document has a name.

        A document of the same text whose file is unknown or gone is taken for the same one: it was
        written before its file was kept, or its file was moved.
        """
        if self._replace or name not in self._hashes:
            return True
        location = self._files.get(name)
        if location is not None and not _is_missing(location):
            return False
        return self._hashes[name] == _hash_of(text)

    def _stored_names(self, file: SourceFile) -> list[str]:
        """Return the stored documents of a file, whichever way its path is spelled."""
        location = file.location
        if location not in self._names:
            location = self._locations.get(os.path.realpath(location), location)
        return self._names.get(location, [])

    @functools.cached_property
    def _locations(self) -> dict[str, str]:
        """The paths of stored documents, by the paths they really have."""
        return {os.path.realpath(location): location for location in list(self._names)}


def _hash_of(text: str) -> str:
    return content_hash(Document("", np.empty(0, np.int32), text))


def _candidates(document: TextDocument) -> Iterator[str]:
    """Yield names for a document: its key, then with more and more of its file's path before it."""
    name = document.key
    yield name
    head = document.file.location.removesuffix(f"/{name}")
    for part in reversed(Path(head).parts[1:]):
        name = f"{os.fsencode(part).decode('utf-8', 'replace')}/{name}"
        yield name


def _is_under(location: str, places: AbstractSet[str]) -> bool:
    """Tell whether a path is one of some absolute paths, or below one."""
    return not places.isdisjoint([location, *map(str, Path(location).parents)])


def _is_missing(location: str) -> bool:
    """Tell whether a file is gone, as far as can be seen: a locked folder may still have it."""
    try:
        Path(location).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
