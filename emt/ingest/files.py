"""Find the files of documents in folders: links are followed, and each file is found once."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from emt.errors import CorpusError


@dataclass(frozen=True)
class SourceFile:
    """A file of documents.

    Attributes:
        path: as it was given, or below the folder that was given.
        name: its path below that folder, with "/" between parts; its own name if it was given.
        is_given: it was given itself.
    """

    path: Path
    name: str
    is_given: bool = False

    @property
    def location(self) -> str:
        """The absolute path; links in it stay, so that a link may point elsewhere tomorrow."""
        return os.path.abspath(self.path)  # noqa: PTH100 (Path.resolve follows links)


@dataclass
class Found:
    """What some files and folders have.

    Attributes:
        files: in the order of the sources; those of a folder are sorted by path.
        folders: the folders that were given, as absolute paths.
        errors: of sources that cannot be read at all.
        unread: places inside of folders that cannot be read, with the reason.
    """

    files: list[SourceFile] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    errors: list[CorpusError] = field(default_factory=list)
    unread: dict[Path, str] = field(default_factory=dict)


def find_files(
    sources: Iterable[Path | str], suffixes: Collection[str], *, may_be_empty: bool = False
) -> Found:
    """Find the files of some suffixes, those in folders at any depth, and each file once.

    Hidden files and folders are passed over inside of folders. `may_be_empty` allows folders
    without any file.
    """
    search = _Search(suffixes, may_be_empty)
    for source in sources:
        try:
            search.add(Path(source))
        except CorpusError as error:
            search.found.errors.append(error)
    return search.found


class _Search:
    """A search that goes through one source after the other."""

    def __init__(self, suffixes: Collection[str], may_be_empty: bool) -> None:
        self.found = Found()
        self._suffixes = suffixes
        self._may_be_empty = may_be_empty
        self._seen: set[str] = set()  # real paths of files

    def add(self, source: Path) -> None:
        """Add a file, or the files of a folder.

        Raises:
            CorpusError: it is missing, cannot be read, has no documents or another suffix.
        """
        try:
            if source.is_dir():
                self._add_folder(source)
                return
            source.stat()
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                reason = "does not exist. Give a file or a folder of documents"
            else:
                reason = f"cannot be read: {error.strerror}"
            raise CorpusError(f"'{source}' {reason}.") from error
        if source.suffix.lower() not in self._suffixes:
            raise CorpusError(
                f"expected a {', '.join(self._suffixes)} file or a folder of them; got '{source}'. "
                "Convert it to text first."
            )
        self._add_files([source], source.parent, is_given=True)

    def _add_folder(self, folder: Path) -> None:
        os.scandir(folder).close()  # an error of the folder itself stops the run
        self.found.folders.append(os.path.abspath(folder))  # noqa: PTH100
        files = self._files_below(folder)
        if not files and not self._may_be_empty:
            raise CorpusError(
                f"folder '{folder}' has no documents. Put {', '.join(self._suffixes)} files "
                "into it."
            )
        self._add_files(files, folder)

    def _add_files(self, files: list[Path], folder: Path, *, is_given: bool = False) -> None:
        """Add files that were not found before: a file itself comes before links to it."""
        new = []
        for path in sorted(files, key=lambda path: path.is_symlink()):
            real = os.path.realpath(path)
            if real not in self._seen:
                self._seen.add(real)
                new.append(path)
        below = sorted((path.relative_to(folder), path) for path in new)
        self.found.files += [SourceFile(path, name.as_posix(), is_given) for name, path in below]

    def _files_below(self, folder: Path) -> list[Path]:
        """Return the files of a folder; each folder that links lead to is searched once."""
        files: list[Path] = []
        folders, links = [folder], list[Path]()
        searched = set[str]()
        while folders or links:
            here = folders.pop() if folders else links.pop()
            real = os.path.realpath(here)
            if real in searched:
                continue
            searched.add(real)
            try:
                with os.scandir(here) as scan:
                    entries = [entry for entry in scan if not entry.name.startswith(".")]
            except OSError as error:
                self.found.unread[here] = str(error.strerror)
                continue
            for entry in entries:
                path = here / entry.name
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                    elif path.suffix.lower() in self._suffixes:
                        entry.stat()  # a link may lead nowhere
                        files.append(path)
                    elif entry.is_symlink() and not path.suffix:  # to a folder that is gone?
                        entry.stat()
                except OSError as error:
                    self.found.unread[path] = str(error.strerror)
        return files
