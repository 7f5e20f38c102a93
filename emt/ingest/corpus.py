"""Files and folders to documents: .txt, .md, .jsonl, and folders of them.

Everything is read and checked once before the first document is yielded, so bad input stops a run
before it has written anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emt.errors import CorpusError, DocumentError
from emt.ingest.documents import is_utf8
from memory_backends.catalog.metadata import check_metadata
from memory_backends.layout import Metadata

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class TextDocument:
    """A document of text, exactly as in the file, with the metadata of its .jsonl line.

    Attributes:
        name: the file's path below the folder that was given, or the "id" of a .jsonl line.
        origin: file, and line for .jsonl, for error messages.
    """

    name: str
    text: str
    origin: str
    metadata: Metadata | None = None


class Corpus:
    """The documents of some files and folders, in a fixed order, read from the disk each time.

    Args:
        sources: .txt and .md files (one document each); .jsonl files (a line is an object with
            "id", "text" and, if any, "metadata", a flat object); and folders of such files, at any
            depth, sorted by path.

    Raises:
        CorpusError: no source, or one that is missing, empty, binary or not UTF-8, a folder without
            documents, a .jsonl line that is not such an object, or a name that comes twice.
    """

    def __init__(self, sources: Iterable[Path | str]) -> None:
        self._files = [file for source in sources for file in _files_of(Path(source))]
        if not self._files:
            raise CorpusError("expected at least one file or folder of documents; got none.")
        origins: dict[str, str] = {}
        for document in self:
            if document.name in origins:
                raise CorpusError(
                    f"document names must be unique; '{document.name}' is in "
                    f"{origins[document.name]} and in {document.origin}. "
                    "Rename one of them, or give it once."
                )
            origins[document.name] = document.origin
        self.names = list(origins)

    def __iter__(self) -> Iterator[TextDocument]:
        for path, name in self._files:
            yield from _documents_of(path, name)


def _files_of(source: Path) -> list[tuple[Path, str]]:
    """Return (file, document name) of each file of a source; hidden ones in folders are skipped."""
    try:
        if source.is_dir():
            return _files_in(source)
        source.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            reason = "does not exist. Give a file or a folder of documents"
        else:
            reason = f"cannot be read: {error.strerror}"
        raise CorpusError(f"'{source}' {reason}.") from error
    if source.suffix.lower() not in SUFFIXES:
        raise CorpusError(
            f"expected a {', '.join(SUFFIXES)} file or a folder of them; got '{source}'. "
            "Convert it to text first."
        )
    return [(source, source.name)]


def _files_in(folder: Path) -> list[tuple[Path, str]]:
    files = []
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in below.parts)
        if path.suffix.lower() in SUFFIXES and not is_hidden and path.is_file():
            files.append((path, below.as_posix()))
    if not files:
        raise CorpusError(
            f"folder '{folder}' has no documents. Put {', '.join(SUFFIXES)} files into it."
        )
    return files


def _documents_of(path: Path, name: str) -> Iterator[TextDocument]:
    text = _read(path)
    if path.suffix.lower() != ".jsonl":
        if not is_utf8(name):  # a file system that takes any bytes
            raise CorpusError(f"the name of file {name!r} is not UTF-8. Rename it.")
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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise CorpusError(f"{origin} cannot be read as JSON: {error}.") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{origin} must be an object; got {type(record).__name__}.")
    for key in ("id", "text"):
        if key not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise CorpusError(f'{origin} must have the keys "id" and "text"; got {keys}.')
    name, text = record["id"], record["text"]
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    for key, value in (("id", name), ("text", text)):
        if not isinstance(value, str) or not value.strip():
            got = "blank text" if isinstance(value, str) else type(value).__name__
            expected = "text or a whole number" if key == "id" else "text"
            raise CorpusError(f'{origin}: "{key}" must be {expected}, not blank; got {got}.')
        if not is_utf8(value):
            raise CorpusError(
                f'{origin}: "{key}" has half of a surrogate pair (\\ud800 to \\udfff), which is no '
                "character. Correct the escape."
            )
    metadata = record.get("metadata")
    if metadata is not None:
        try:
            check_metadata(metadata, name)
        except DocumentError as error:
            raise CorpusError(f"{origin}: {error}") from error
    return TextDocument(name, text, origin, metadata)
