"""Token ids decoded in parts: against the text that they were made of."""

import random
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from emt.citations.characters import decode_whole, text_of_tokens
from tests.emt.bytes import byte_tokenizer
from tests.timing import is_linear

TEXT = "Café, 灯台守の猫は、霧の夜 नहर के पेड़ 👩\u200d👩\u200d👧 «да» 🇫🇷🇩🇪 Ångstro\u0308m. Ende!"


def fallback_tokenizer():
    """Return a tokenizer of a few words and all bytes, as SentencePiece has them."""
    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, "▁": 3}
    vocabulary |= {f"<0x{byte:02X}>": byte + 4 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def fallback_ids(text):
    return [byte + 4 for byte in text.encode()]


IDS = {
    "bytes": (byte_tokenizer(), byte_tokenizer()(TEXT).input_ids),  # with <bos> and <eos>
    "fallback": (fallback_tokenizer(), [1, 2, *fallback_ids(TEXT), 1, 2, 1]),
}


@pytest.mark.parametrize("name", IDS)
def test_texts_of_tokens_are_the_text(name):
    tokenizer, ids = IDS[name]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(text_of_tokens(ids, tokenizer)) == text
    for stop in range(60):  # some end in the middle of a character
        texts = text_of_tokens(ids[:stop], tokenizer)
        assert len(texts) == stop
        whole = "".join(texts).rstrip("\ufffd")
        assert text.startswith(whole)
        assert len(whole) >= len("".join(texts)) - 3


def test_the_last_token_of_a_character_has_it():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé猫😀b").input_ids
    characters = ["a", "", "é", "", "", "猫", "", "", "", "😀", "b"]
    assert text_of_tokens(ids, tokenizer) == ["", *characters, ""]


@pytest.mark.parametrize("seed", range(20))
def test_texts_of_any_bytes_are_the_text(seed):
    rng = random.Random(seed)
    tokenizer = byte_tokenizer()
    characters = [tokenizer(character).input_ids[1:-1] for character in "aé猫😀 "]
    ids = [token for part in rng.choices(characters, k=30) for token in part]
    ids = [token for token in ids if rng.random() < 0.9]  # some characters are broken
    assert "".join(text_of_tokens(ids, tokenizer)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("length", [1, 2, 5, 8, 32])
def test_parts_are_of_whole_characters(name, length):
    tokenizer, ids = IDS[name]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    parts = [
        decode_whole(ids, first, min(first + length, len(ids)), tokenizer)
        for first in range(0, len(ids), length)
    ]
    assert all(part.strip() in text and "\ufffd" not in part for part in parts)
    for part in filter(None, parts):
        assert unicodedata.category(part[0])[0] != "M"
        assert "\u200d" not in (part[0], part[-1])
    if length == 32:
        joined = "".join("".join(part.split()) for part in parts)
        assert joined == "".join(text.split())


def test_what_is_broken_at_the_edge_of_a_document_is_left_out():
    tokenizer = byte_tokenizer()
    ids = tokenizer("猫は猫").input_ids[2:-2]  # without the first byte and the last one
    assert decode_whole(ids, 0, len(ids), tokenizer) == "は"
    assert decode_whole(ids[:1], 0, 1, tokenizer) == ""


@pytest.mark.parametrize("text", ["a", "猫", "🇫"])
def test_time_is_linear(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text * 2000).input_ids
    assert is_linear(lambda size: text_of_tokens(ids[:size], tokenizer), 300)
    broken = tokenizer("猫").input_ids[2:3] * 1200
    assert is_linear(lambda size: text_of_tokens(broken[:size], tokenizer), 300)
