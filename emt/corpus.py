"""Files and folders to documents: .txt, .md, .jsonl, and folders of them.

Everything is read and checked once before the first document is handed out, so bad input stops a
run before it has written anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emt.errors import CorpusError

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class TextDocument:
    """A document as it was found.

    Attributes:
        name: the file's path below the folder that was given, or the "id" of a .jsonl line.
        text: exactly as in the file.
        origin: file, and line for .jsonl, for error messages.
    """

    name: str
    text: str
    origin: str


class Corpus:
    """The documents of some files and folders, in a fixed order. Iterating reads them from the
    disk.

    Args:
        sources: .txt and .md files (one document each), .jsonl files (one object with "id" and
            "text" a line), and folders, searched through and sorted by path.

    Raises:
        CorpusError: a source that is missing, empty, binary or not UTF-8, a folder without
            documents, a .jsonl line that is not such an object, or a name that comes twice.
    """

    def __init__(self, sources: Iterable[Path | str]) -> None:
        self._files = [found for source in sources for found in _files_of(Path(source))]
        self.num_documents = 0
        self.num_characters = 0
        origins: dict[str, str] = {}
        for document in self:
            if document.name in origins:
                raise CorpusError(
                    f"document names must be unique; '{document.name}' is in "
                    f"{origins[document.name]} and in {document.origin}. Rename one of them."
                )
            origins[document.name] = document.origin
            self.num_documents += 1
            self.num_characters += len(document.text)
        self.names = list(origins)

    def __iter__(self) -> Iterator[TextDocument]:
        for path, name in self._files:
            yield from _documents_of(path, name)


def _files_of(source: Path) -> list[tuple[Path, str]]:
    """Return (file, document name) of each file of a source."""
    if source.is_dir():
        found = sorted(
            path
            for path in source.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
        )
        if not found:
            raise CorpusError(
                f"folder '{source}' has no documents. Put {', '.join(SUFFIXES)} files into it."
            )
        return [(path, path.relative_to(source).as_posix()) for path in found]
    if not source.exists():
        raise CorpusError(f"'{source}' does not exist. Give a file or a folder of documents.")
    if source.suffix.lower() not in SUFFIXES:
        raise CorpusError(
            f"expected a {', '.join(SUFFIXES)} file or a folder of them; got '{source}'. "
            "Convert it to text first."
        )
    return [(source, source.name)]


def _documents_of(path: Path, name: str) -> Iterator[TextDocument]:
    text = _read(path)
    if path.suffix.lower() != ".jsonl":
        yield TextDocument(name, text, f"'{path}'")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document_of_line(line, f"'{path}' line {number}")


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"'{path}' cannot be read: {error.strerror}.") from error
    if b"\0" in data:
        raise CorpusError(f"'{path}' is binary; expected UTF-8 text. Convert it or leave it out.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"'{path}' is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}. "
            "Convert it to UTF-8 or leave it out."
        ) from error
    if not text.strip():
        raise CorpusError(f"'{path}' is empty. Leave it out.")
    return text


def _document_of_line(line: str, origin: str) -> TextDocument:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{origin} is not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{origin} must be an object; got {type(record).__name__}.")
    for key in ("id", "text"):
        if key not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise CorpusError(f'{origin} must have the keys "id" and "text"; got {keys}.')
    name, text = record["id"], record["text"]
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise CorpusError(f'{origin}: "id" must be a string or a number; got {name!r}.')
    if not isinstance(text, str) or not text.strip():
        raise CorpusError(f'{origin}: "text" must be a string that is not empty; got {text!r}.')
    return TextDocument(str(name), text, origin)
