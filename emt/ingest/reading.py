"""Files to documents of text: what is read from a file, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from emt.errors import CorpusError, DocumentError
from emt.ingest.conversion import CONVERTED, convert
from emt.ingest.documents import is_utf8
from emt.ingest.files import SourceFile
from memory_backends.catalog.metadata import check_metadata
from memory_backends.layout import Metadata

SUFFIXES = (".txt", ".md", ".jsonl", *CONVERTED)


@dataclass(frozen=True)
class TextDocument:
    """A document of text, exactly as in the file, with the metadata of its .jsonl line.

    Attributes:
        name: of the document; it depends on what else is read and stored.
        file: where it comes from.
        origin: file, and line for .jsonl, for error messages.
        key: which of the file's documents it is: the "id" of a .jsonl line, else the file's name.
    """

    name: str
    text: str
    origin: str
    file: SourceFile
    key: str
    metadata: Metadata | None = None


def read_text(file: SourceFile) -> str:
    """Return the text of a file; that of a .jsonl file is its lines.

    Raises:
        CorpusError: it is missing, empty, binary, not UTF-8, or cannot be converted.
    """
    path = file.path
    if not is_utf8(file.name):  # a file system that takes any bytes
        raise CorpusError(f"the name of file {file.name!r} is not UTF-8. Rename it.")
    try:
        if not path.is_file() and path.exists():  # a pipe would wait for ever
            raise CorpusError(f"'{path}' is no regular file. Leave it out.")
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"'{path}' cannot be read: {error.strerror}.") from error
    if path.suffix.lower() in CONVERTED and data:
        return convert(path, data)
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


def documents_of(file: SourceFile, text: str) -> Iterator[TextDocument | CorpusError]:
    """Yield the documents of a file's text, and an error for each line that is none."""
    if file.path.suffix.lower() != ".jsonl":
        yield TextDocument(file.name, text, f"'{file.path}'", file, file.name)
        return
    lines: dict[str, int] = {}  # id -> line
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = _document_of_line(line, file, f"'{file.path}' line {number}")
        except CorpusError as error:
            yield error
            continue
        first = lines.setdefault(document.key, number)
        if first == number:
            yield document
        else:
            yield CorpusError(
                f"ids must be unique; '{document.key}' is in '{file.path}' line {first} and in "
                f"line {number}. Change one of them."
            )


def _document_of_line(line: str, file: SourceFile, origin: str) -> TextDocument:
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
    return TextDocument(name, text, origin, file, name, metadata)
