"""Long texts as token ids, for experiments that need length and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.errors import DocumentError
from experiments.rows import read_rows

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
        path: rows with a "text" each, named by the first of their "id", "idx", "title" and
            "heading", or by their number; a .txt file is one text.
        tokenizer: the model's.
        piece_tokens: cut every text into pieces of so many tokens; what is left over is not used.

    Raises:
        ConfigError: a file of another kind.
        DocumentError: the file cannot be read or is empty, a row has no text, a name comes twice,
            or no text is as long as a piece.
    """
    texts: dict[str, LongText] = {}
    longest = 0
    for name, text in _texts_of(Path(path)):
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
        token_ids = torch.tensor(cast(list[int], encoded["input_ids"]), dtype=torch.long)
        longest = max(longest, len(token_ids))
        for piece in _pieces(name, token_ids, piece_tokens):
            if piece.name in texts:
                raise DocumentError(f"texts of '{path}': the name '{piece.name}' comes twice.")
            texts[piece.name] = piece
    if not texts:
        raise DocumentError(
            f"pieces of {piece_tokens} tokens need a text as long; the longest in '{path}' has "
            f"{longest}. Lower piece_tokens."
        )
    return list(texts.values())


def fingerprint(content: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of some bytes, for a results file's header."""
    return hashlib.sha256(content).hexdigest()[:16]


def first_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the special ids that a tokenizer puts before every text, (n,) int64; often none."""
    whole, bare = (
        cast(list[int], tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"])
        for special in (True, False)
    )
    start = whole.index(bare[0]) if bare and bare[0] in whole else 0
    return torch.tensor(whole[:start], dtype=torch.long)


def _pieces(name: str, token_ids: Tensor, length: int | None) -> Iterator[LongText]:
    if length is None:
        yield LongText(name, token_ids)
        return
    for number in range(len(token_ids) // length):
        yield LongText(f"{name} [{number}]", token_ids[number * length : (number + 1) * length])


def _texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield names and texts."""
    if path.suffix.lower() != ".txt":
        for number, row in enumerate(read_rows(path, required=["text"]), start=1):
            name = next((row[key] for key in _NAMES if key in row), number)
            yield str(name), row.text("text")
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"texts '{path}' cannot be read: {error}") from error
    if not text.strip():
        raise DocumentError(f"'{path}' is empty. Give a file with a text.")
    yield path.name, text
