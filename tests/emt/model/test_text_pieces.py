"""A text in pieces: whole characters, as soon as they are there, and together the whole text."""

import torch
import pytest

from emt.model.text_pieces import TextPieces, text_of
from tests.emt.bytes import byte_tokenizer


def streamed(token_ids):
    """Return the pieces after each token, and the rest."""
    tokenizer, steps = byte_tokenizer(), [[]]
    streamer = TextPieces(tokenizer, lambda piece: steps[-1].append(piece))
    streamer.put(torch.tensor([[1, 50, 60]]))  # the prompt
    for token_id in token_ids:
        streamer.put(torch.tensor([token_id]))
        steps.append([])
    streamer.end()
    pieces = ["".join(step) for step in steps]
    assert "".join(pieces) == text_of(tokenizer, token_ids)
    return pieces


def ids_of(text):
    return byte_tokenizer()(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        (ids_of("a bc"), ["a", "", " b", "c", ""]),
        (ids_of(" \n a "), ["", "", "", "a", "", ""]),
        (ids_of("é猫!"), ["", "é", "", "", "猫", "!", ""]),
        (ids_of("猫")[:2], ["", "", "\ufffd"]),
        ([*ids_of("猫")[:2], *ids_of("a")], ["", "", "\ufffda", ""]),
        ([2, *ids_of("a"), 2], ["", "a", "", ""]),
        ([], [""]),
    ],
)
def test_pieces_are_whole_characters(token_ids, expected):
    assert streamed(token_ids) == expected
