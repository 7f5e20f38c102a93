"""From the text or token ids that a user gives to a checked document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from emt.config import MemoryConfig
from emt.errors import DocumentError, MemoryUseError
from memory_backends import Document

Source = str | Sequence[int] | torch.Tensor


def to_document(
    source: Source, name: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Document:
    """Make a document of text, or of token ids of shape (T,) or (1, T) below `vocab_size`.

    A fast tokenizer also tells where each token stands in the text.

    Raises:
        DocumentError: the name is empty, or the source is empty, no token ids, or has an id that
            the model does not have.
        MemoryUseError: text without a tokenizer.
    """
    if not isinstance(name, str) or not name:
        raise DocumentError(f"a document's name must be text; got {name!r}.")
    if not is_utf8(name):
        raise DocumentError(f"a document's name must be valid Unicode; got {name!r}.")
    if isinstance(source, str):
        return _of_text(source, name, tokenizer, vocab_size)
    return Document(name, _checked(_of_ids(source, name), name, vocab_size))


def is_utf8(text: str) -> bool:
    """Tell whether text can be written as UTF-8: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def special_ids(
    config: MemoryConfig, tokenizer: PreTrainedTokenizerBase | None, model_config: PreTrainedConfig
) -> set[int]:
    """Return the ids that leave no rows: the config's, the tokenizer's, or the model's own."""
    if not config.remove_special_ids:
        return set()
    if config.special_ids is not None:
        return set(config.special_ids)
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    special: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(model_config, name, None)
        special.update([ids] if isinstance(ids, int) else ids or [])
    return special


def _of_text(
    text: str, name: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Document:
    if tokenizer is None:
        raise MemoryUseError(
            "writing text needs a tokenizer. "
            "Pass one to attach(model, config, tokenizer=...), or write ids."
        )
    if not text.strip():
        raise DocumentError(f"document '{name}' is empty. Leave it out.")
    if not is_utf8(text):
        raise DocumentError(
            f"document '{name}' has half of a surrogate pair, which is no character. "
            "Decode it as UTF-8."
        )
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    offsets = encoded.get("offset_mapping")
    return Document(
        name,
        _checked(np.asarray(encoded["input_ids"], dtype=np.int64), name, vocab_size),
        text,
        None if offsets is None else np.asarray(offsets, dtype=np.int32),
    )


def _checked(
    ids: npt.NDArray[np.integer[Any]], name: str, vocab_size: int
) -> npt.NDArray[np.int32]:
    """Return ids as int32; refuse those that are not the model's."""
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise DocumentError(
            f"token ids of document '{name}' must be 0 to {vocab_size - 1}; "
            f"got {ids.min()} to {ids.max()}. Use the model's own tokenizer."
        )
    return ids.astype(np.int32)


def _of_ids(source: Any, name: str) -> npt.NDArray[np.integer[Any]]:
    try:
        ids = np.asarray(source.cpu() if isinstance(source, torch.Tensor) else source)
    except (ValueError, TypeError) as error:  # rows of different lengths, bfloat16
        raise DocumentError(f"document '{name}' is neither text nor token ids: {error}") from error
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise DocumentError(
            f"document '{name}' must be text or token ids of shape (T,) or (1, T), "
            f"T at least 1; got {ids.dtype} of shape {ids.shape}."
        )
    return ids
