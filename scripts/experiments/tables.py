"""Rows of a data set: JSON lines, Parquet, a Hugging Face `datasets.Dataset`, or any dicts."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emt.errors import ConfigError, DocumentError

Source = str | Path | Iterable[Mapping[str, Any]]

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_SUFFIXES = (*_JSON_LINES, ".parquet")


class Row(dict[str, Any]):
    """One row: field -> value, and where it stands.

    Attributes:
        origin: file and row, counted from 1, for error messages.
    """

    def __init__(self, fields: Mapping[str, Any], origin: str) -> None:
        super().__init__(fields)
        self.origin = origin

    def text(self, field: str) -> str:
        """Return a field that must be text.

        Raises:
            DocumentError: it is not there, not text, or blank.
        """
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            found = "nothing" if value is None else repr(value)[:60]
            raise DocumentError(f"{self.origin}: field '{field}' must be text; got {found}.")
        return value


def read_rows(
    source: Source,
    *,
    required: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Read rows one by one, and check that their fields are there.

    Args:
        source: a JSON lines file (`.jsonl`, `.ndjson`, each also with `.gz`), a `.parquet` file, a
            `datasets.Dataset`, or any iterable of mappings.
        required: fields that every row must have, in our names.
        columns: our name of a field -> the data set's, for those that differ; other columns keep
            their names.

    Raises:
        ConfigError: the file's kind is unknown, pyarrow is needed and not there, or a mapping of
            columns that cannot be applied.
        DocumentError: the file cannot be read, or a row is not a mapping or lacks a field; with
            file, row and field.
    """
    mapping = _checked(columns or {})
    name, rows = _open(source)
    for number, found in enumerate(rows, start=1):
        yield _renamed(found, mapping, required, f"{name} row {number}")


def _checked(columns: Mapping[str, str]) -> dict[str, str]:
    for ours, theirs in columns.items():
        if not isinstance(ours, str) or not isinstance(theirs, str):
            raise ConfigError(
                f"columns must map names to names; got {ours!r}: {theirs!r}. "
                "Write them like columns: {context: passage}."
            )
    return dict(columns)


def _renamed(found: Any, columns: Mapping[str, str], required: Sequence[str], origin: str) -> Row:
    """Return a row in our names."""
    if not isinstance(found, Mapping):
        raise DocumentError(f"{origin} must be a mapping; got {type(found).__name__}.")
    taken = set(columns.values())
    fields = {key: value for key, value in found.items() if key not in taken}
    for ours, theirs in columns.items():
        if theirs in found:
            fields[ours] = found[theirs]
    for field in required:
        if fields.get(field) is None:
            wanted = columns.get(field, field)
            renamed = "" if wanted == field else f" (column '{wanted}')"
            there = ", ".join(map(str, found)) or "none"
            raise DocumentError(
                f"{origin} has no field '{field}'{renamed}; its columns are {there}. "
                "Name them with columns: {ours: theirs}."
            )
    return Row(fields, origin)


def _open(source: Source) -> tuple[str, Iterable[Any]]:
    """Return what to call the source in messages, and its rows."""
    if not isinstance(source, str | Path):
        return "data set", source
    path = Path(source)
    if not path.is_file():
        raise DocumentError(f"data file '{path}' does not exist. Correct its path.")
    name = path.name.lower()
    if name.endswith(".parquet"):
        return f"'{path}'", _parquet(path)
    if name.endswith(_JSON_LINES):
        return f"'{path}'", _json_lines(path)
    raise ConfigError(f"expected a {', '.join(_SUFFIXES)} file; got '{path}'. Convert it first.")


def _json_lines(path: Path) -> Iterator[Any]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig"
        ) as file:
            for number, line in enumerate(file, start=1):  # noqa: B007 - named in an error
                if line.strip():
                    yield json.loads(line)
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"'{path}' line {number} is not JSON: {error.msg} at column {error.colno}."
        ) from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, RecursionError) as error:
        raise DocumentError(f"'{path}' cannot be read after line {number}: {error}.") from error


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(
            f"reading '{path}' needs pyarrow: pip install 'emt[experiments]'."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DocumentError(f"'{path}' cannot be read as Parquet: {reason}") from error
