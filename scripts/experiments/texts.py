"""Long texts as token ids, for experiments that need length and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.errors import DocumentError

_NAMES = ("id", "idx", "title", "heading")


class LongText(NamedTuple):
    """A text, or a piece of one.

    Attributes:
        name: unique among the texts of a file.
        token_ids: (T,) int64, without special ids.
    """

    name: str
    token_ids: Tensor


def read_texts(
    path: Path | str, tokenizer: PreTrainedTokenizerBase, *, piece_tokens: int | None = None
) -> list[LongText]:
    """Read texts from a file.

    Args:
        path: a .jsonl file of objects with a "text" each, named by the first of their "id", "idx",
            "title" and "heading", or by their line; any other file is one text.
        tokenizer: the model's.
        piece_tokens: cut every text into pieces of so many tokens; what is left over is not used.

    Raises:
        DocumentError: the file is missing, not UTF-8 or empty, or a line is not such an object, or
            a name comes twice, or no text is as long as a piece.
    """
    found: dict[str, LongText] = {}
    longest = 0
    for name, text in _texts_of(Path(path)):
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        token_ids = torch.tensor(cast(list[int], encoded["input_ids"]), dtype=torch.long)
        longest = max(longest, len(token_ids))
        for piece in _pieces(name, token_ids, piece_tokens):
            if piece.name in found:
                raise DocumentError(
                    f"texts of '{path}' must have names of their own; "
                    f"'{piece.name}' comes twice. Rename one."
                )
            found[piece.name] = piece
    if not found:
        raise DocumentError(
            f"pieces of {piece_tokens} tokens need a text as long; the longest in '{path}' has "
            f"{longest}. Lower piece_tokens."
        )
    return list(found.values())


def fingerprint(path: Path | str) -> str:
    """Return the first 16 hex digits of a file's SHA-256.

    Raises:
        DocumentError: it cannot be read.
    """
    return hashlib.sha256(_bytes_of(Path(path))).hexdigest()[:16]


def first_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the special ids that a tokenizer puts before every text, (n,) int64; often none."""
    with_them, without = (
        cast(list[int], tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"])
        for added in (True, False)
    )
    start = next((at for at in range(len(with_them)) if with_them[at:][:1] == without[:1]), 0)
    return torch.tensor(with_them[:start], dtype=torch.long)


def _pieces(name: str, token_ids: Tensor, length: int | None) -> Iterator[LongText]:
    if length is None:
        yield LongText(name, token_ids)
        return
    for number in range(len(token_ids) // length):
        yield LongText(f"{name} [{number}]", token_ids[number * length : (number + 1) * length])


def _texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield names and texts."""
    try:
        text = _bytes_of(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"'{path}' is not UTF-8: {error}. Convert it.") from error
    if not text.strip():
        raise DocumentError(f"'{path}' is empty. Give a file of texts.")
    if path.suffix.lower() != ".jsonl":
        yield path.name, text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = _record(line, f"'{path}' line {number}")
            name = next((record[key] for key in _NAMES if key in record), number)
            yield str(name), record["text"]


def _record(line: str, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{origin} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise DocumentError(f'{origin} must be an object with a "text"; got {got}.')
    return record


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DocumentError(
            f"texts '{path}' cannot be read: {error.strerror}. Set data to a .txt or .jsonl file."
        ) from error
