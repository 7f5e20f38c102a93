"""Text and ids to documents; `test_memory.py` has what `Memory.write` refuses."""

import torch
import numpy as np
import pytest

from emt.config import MemoryConfig
from emt.errors import DocumentError
from emt.ingest.documents import is_utf8, special_ids, to_document
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.families import VOCAB_SIZE, build

TEXT = "a\u00e9\r\n\U0001f600e\u0301"


def test_tokens_know_their_characters_when_one_takes_several():
    document = to_document(TEXT, "d", byte_tokenizer(), BYTES_VOCAB_SIZE)
    assert document.text == TEXT
    assert document.token_ids.dtype == document.offsets.dtype == np.int32
    expected = [(0, 0)]
    for at, character in enumerate(TEXT):
        expected += [(at, at + 1)] * len(character.encode())
    assert [tuple(span) for span in document.offsets.tolist()] == [*expected, (0, 0)]
    assert byte_tokenizer().decode(document.token_ids, skip_special_tokens=True) == TEXT


def test_blank_text_and_tokens_of_another_model_are_refused():
    with pytest.raises(DocumentError, match=r"'d' .* 0 to 99; got 1 to 256"):
        to_document(TEXT, "d", byte_tokenizer(), 100)
    with pytest.raises(DocumentError, match="document 'd' is empty"):
        to_document("\n", "d", byte_tokenizer(), BYTES_VOCAB_SIZE)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32])
def test_ids_that_wrap_around_in_32_bits_are_refused(dtype):
    ids = np.array([5, 2**32 - 1 if dtype is np.uint32 else 2**32 + 5], dtype=dtype)
    with pytest.raises(DocumentError, match=f"0 to 96; got 5 to {ids[1]}"):
        to_document(ids, "d", None, VOCAB_SIZE)
    if dtype is np.int64:
        with pytest.raises(DocumentError, match="0 to 96; got 5 to 4294967301"):
            to_document(torch.from_numpy(ids), "d", None, VOCAB_SIZE)


def test_halves_of_surrogate_pairs_are_refused():
    assert is_utf8("\U0001f600")
    assert not is_utf8("\ud83d")
    with pytest.raises(DocumentError, match="document 'd' has half of a surrogate pair"):
        to_document("a \ud83d b", "d", byte_tokenizer(), BYTES_VOCAB_SIZE)
    with pytest.raises(DocumentError, match=r"name must be valid Unicode; got '\\ud83d'"):
        to_document([5], "\ud83d", None, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("settings", "has_tokenizer", "expected"),
    [
        ({}, True, {0, 1, 2}),
        ({}, False, {0, 1, 7, 8}),
        ({"special_ids": [5]}, True, {5}),
        ({"special_ids": []}, True, set()),
        ({"special_ids": [5], "remove_special_ids": False}, True, set()),
    ],
)
def test_special_ids(settings, has_tokenizer, expected):
    config = build("llama", eos_token_id=[7, 8]).config
    tokenizer = byte_tokenizer() if has_tokenizer else None
    assert special_ids(MemoryConfig.published(**settings), tokenizer, config) == expected
