"""Files and folders to documents, with names and errors.

Everything is read and checked once before the first document is yielded, so bad input stops a run
before it has written anything. What was read is kept, as long as it is not much.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from emt.errors import CorpusError, EMTError
from emt.ingest.conversion import missing_packages
from emt.ingest.files import SourceFile, find_files
from emt.ingest.names import DocumentNames
from emt.ingest.reading import SUFFIXES, TextDocument, documents_of, read_text

_KEPT_CHARACTERS = 64 * 2**20  # of texts that are not read again, or converted again


class Corpus:
    """The documents of some files and folders, in a fixed order.

    Args:
        sources: .txt, .md, .pdf, .html and .docx files (one document each); .jsonl files (a line is
            an object with "id", "text" and, if any, "metadata", a flat object); and folders of such
            files, at any depth, sorted by path. Links are followed, and no file is read twice.
        names: names the documents, beside those of a store; None for documents of no store.
        skip_errors: leave out what cannot be read, and go on.
        may_be_empty: allow folders without documents.

    Attributes:
        unread: places in the folders that cannot be read, with the reason. They stop no run:
            a volume's own folders often are locked.
        not_installed: suffix -> how many files in the folders need a package that is not installed.

    Raises:
        CorpusError: no source, or one that is missing, empty, binary or not UTF-8, a folder without
            documents, or a .jsonl line that is not such an object; its `errors` are all of them.
    """

    def __init__(
        self,
        sources: Iterable[Path | str],
        *,
        names: DocumentNames | None = None,
        skip_errors: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        self.document_names = DocumentNames({}, {}) if names is None else names
        self._skip_errors = skip_errors
        found = find_files(sources, SUFFIXES, may_be_empty=may_be_empty)
        self.unread, self.folders = found.unread, found.folders
        self.not_installed = Counter[str]()
        self._files = list(self._readable(found.files))
        self._errors: dict[str, EMTError] = {str(error): error for error in found.errors}
        self._unusable: set[str] = set()  # names of documents
        self._bad_files: set[str] = set()  # locations of those with an error
        self._texts: dict[str, str] = {}
        self._num_kept = 0
        self._is_checking = True
        self._names = [document.name for document in self]
        self._is_checking = False
        self.check()
        if not (self.names or may_be_empty):
            raise CorpusError(self._why_empty(), self.errors)

    @property
    def names(self) -> list[str]:
        """The names of the documents."""
        return [name for name in self._names if name not in self._unusable]

    @property
    def errors(self) -> list[EMTError]:
        """What is wrong with files and lines that were left out."""
        return list(self._errors.values())

    def __iter__(self) -> Iterator[TextDocument]:
        for file in self._files:
            try:
                text = self._text(file)
            except CorpusError as error:
                self._refuse(file, error)
                continue
            for document in documents_of(file, text):
                try:
                    if isinstance(document, CorpusError):
                        raise document
                    name = self.document_names.name_of(document)
                except CorpusError as error:
                    self._refuse(file, error)
                    continue
                if name not in self._unusable:
                    yield replace(document, name=name)

    def leave_out(self, document: TextDocument, error: EMTError) -> None:
        """Leave a document out from now on; `check` raises the error."""
        self._unusable.add(document.name)
        self._bad_files.add(document.file.location)
        self._errors.setdefault(str(error), error)

    def check(self) -> None:
        """Raise what is wrong, unless errors are skipped: the only error, or one that has all."""
        if self._skip_errors or not self._errors:
            return
        if len(self._errors) == 1:
            raise self.errors[0]
        raise CorpusError(
            f"{len(self._errors)} files or lines cannot be read: {' '.join(self._errors)}",
            self.errors,
        )

    def gone(self) -> list[str]:
        """Return the documents of the store whose files are gone from the folders."""
        unread = {os.path.abspath(path) for path in self.unread} | self._bad_files  # noqa: PTH100
        return self.document_names.gone(self.folders, unread)

    def _why_empty(self) -> str:
        if self._errors:
            return "no document is left: all files and lines have errors."
        if self.not_installed:
            return (
                f"the only files are {', '.join(self.not_installed)} files, which need packages "
                "that are not installed. Install them with `pip install 'emt[documents]'`."
            )
        return "expected at least one file or folder of documents; got none."

    def _readable(self, files: Iterable[SourceFile]) -> Iterator[SourceFile]:
        """Leave out files in folders whose package is not installed; one that is given is tried."""
        for file in files:
            if file.is_given or not missing_packages(file.path):
                yield file
            else:
                self.not_installed[file.path.suffix.lower()] += 1

    def _text(self, file: SourceFile) -> str:
        """Return the text of a file as it was when it was read first, if that is kept."""
        text = self._texts.get(file.location)
        if text is None:
            text = read_text(file)
            if self._num_kept + len(text) <= _KEPT_CHARACTERS:
                self._texts[file.location] = text
                self._num_kept += len(text)
        return text

    def _refuse(self, file: SourceFile, error: CorpusError) -> None:
        """Note an error; raise it if it comes after all was checked, and errors are not skipped."""
        if not (self._is_checking or self._skip_errors):
            raise error
        self._bad_files.add(file.location)
        self._errors.setdefault(str(error), error)
