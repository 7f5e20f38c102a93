"""Rows of a data file: JSON lines, plain or gzipped, or Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from emt.errors import ConfigError, DocumentError
from emt.ingest.documents import is_utf8

_JSON_LINES = (".jsonl", ".jsonl.gz")


class Row(dict[str, Any]):
    """One row: field -> value.

    Attributes:
        origin: its file and number, counted from 1, for error messages.
    """

    def __init__(self, fields: Mapping[str, Any], origin: str) -> None:
        super().__init__(fields)
        self.origin = origin

    def text(self, field: str) -> str:
        """Return a field that must be text.

        Raises:
            DocumentError: the field is missing, blank, not text or not valid Unicode.
        """
        value = self.get(field)
        if not isinstance(value, str) or not value.strip() or not is_utf8(value):
            shown = "nothing" if value is None else repr(value)[:60]
            raise DocumentError(f"{self.origin}: '{field}' must be text; got {shown}.")
        return value


def read_rows(path: Path | str, required: Sequence[str] = ()) -> Iterator[Row]:
    """Read rows one by one; empty lines are skipped.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file.
        required: fields that every row must have.

    Raises:
        ConfigError: a file of another kind.
        DocumentError: the file cannot be read or has no rows, or a row is no object or lacks a
            field.
    """
    path = Path(path)
    if not path.is_file():
        raise DocumentError(f"'{path}' cannot be read: there is no such file.")
    if path.name.lower().endswith(".parquet"):
        numbered = _parquet(path)
    elif path.name.lower().endswith(_JSON_LINES):
        numbered = _json_lines(path)
    else:
        raise ConfigError(f"expected a {', '.join(_JSON_LINES)} or .parquet file; got '{path}'.")
    number = 0
    for number, fields in numbered:
        origin = f"'{path}' row {number}"
        if not isinstance(fields, Mapping):
            raise DocumentError(f"{origin} must be an object; got a {type(fields).__name__}.")
        for field in required:
            if field not in fields:
                names = ", ".join(map(str, fields)) or "none"
                raise DocumentError(f"{origin} has no field '{field}'; its fields are {names}.")
        yield Row(fields, origin)
    if not number:
        raise DocumentError(f"'{path}' has no rows.")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DocumentError(f"'{path}' row {number} is not JSON: {error}.") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DocumentError(f"'{path}' cannot be read after row {number}: {error}.") from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DocumentError(f"'{path}' cannot be read as Parquet: {reason}") from error
