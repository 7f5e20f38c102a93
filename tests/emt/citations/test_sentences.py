"""Sentences of many scripts, and of a part of a document: those of the whole document."""

import numpy as np
import pytest

from emt.citations.sentences import sentence_spans, sentences_of
from memory_backends import StoredDocument
from tests.timing import is_linear

PIECES = [
    "word",
    "Dr",
    "end.",
    'said."',
    "why?",
    "\n",
    "\n\n",
    "  ",
    "\u6587\u3002",
    "\u0939\u0948\u0964",
    "x" * 30,
    "\t",
]


def random_document(seed):
    """Return a document of pieces, each of which is a token unless it is blank."""
    rng = np.random.default_rng(seed)
    often = rng.random(len(PIECES)) ** 3  # some texts have hardly any sentence's end
    text, spans = "", []
    for piece in rng.choice(PIECES, 3000, p=often / often.sum()).tolist():
        if not piece.isspace():
            spans.append((len(text), len(text) + len(piece)))
        elif rng.random() < 0.1:  # a special token, which stands nowhere
            spans.append((len(text), len(text)))
        text += piece + " " * int(rng.integers(2))
    ids = np.arange(len(spans), dtype=np.int32)
    return StoredDocument("d", ids, text, np.array(spans, dtype=np.int32), row_tokens=ids)


@pytest.mark.parametrize("seed", range(12))
def test_a_part_has_the_sentences_of_the_whole(seed):
    document = random_document(seed)
    total = len(document.token_ids)
    whole = sentences_of(document)
    assert whole[0, 0] == 0
    assert whole[-1, 1] == total
    assert (whole[1:, 0] == whole[:-1, 1]).all()
    rng = np.random.default_rng(seed)
    stands = np.flatnonzero(np.diff(document.offsets))  # not special tokens
    for _ in range(40):
        first, last = sorted(rng.choice(stands, 2).tolist())
        stop = last + 1
        part = sentences_of(document, first, stop)
        inner = whole[(whole[:, 0] > first) & (whole[:, 0] < stop), 0]
        assert part[:, 0].tolist() == [first, *inner.tolist()]
        assert part[:, 1].tolist() == [*inner.tolist(), stop]


def test_a_part_of_ids_has_the_runs_of_the_whole():
    document = StoredDocument("d", np.arange(100, dtype=np.int32))
    assert sentences_of(document)[:, 0].tolist() == [0, 32, 64, 96]
    assert sentences_of(document, 32, 70).tolist() == [[32, 64], [64, 70]]
    assert sentences_of(document, 40, 41).tolist() == [[40, 41]]
    assert sentences_of(document, 40, 90).tolist() == [[40, 64], [64, 90]]


@pytest.mark.parametrize(
    "sentences",
    [
        ["पानी मीठा है।", "कहाँ है?", '"यहाँ।"', "दो॥"],
        ["پانی میٹھا ہے۔", "کہاں ہے؟", "یہاں۔"],
        ["من بنى البئر؟", "بناها الجد.", "متى؟!", "كيف!؟", "أمس."],
        ["Ջուրը քաղցր է։", "Որտե՞ղ է։", "Այստեղ։"],
        ["ውኃው ጣፋጭ ነው።", "የት ነው፧", "እዚህ፡፡", "አዎ።"],
        ["ရေက ချိုတယ်။", "ဘယ်မှာလဲ။", "ဒီမှာ။"],
        ["ទឹកផ្អែម។", "នៅឯណា?", "នៅទីនេះ៕"],
        ["བོད་ཡིག་ཡིན།", "གང་ན་ཡོད།།", "འདི་ན།"],
        ["Το νερό είναι γλυκό.", "Ποιος ήρθε;", "Πού\u037e", "Εδώ."],
        ["Вода сладкая.", "«Где она?»", "Да!"],
        ["„Wo?“", "»Hier.«", "“Sure.”", "(Yes!)", "‘No.’", "It is 3.14, see a.b."],
        ["面积是３．１４。", "“好。”", "（对！）", "真的？！", "是．"],
        ["ᠤᠰᠤ᠃", "ᠬᠠᠮᠢᠭᠠ᠃"],
        ["물이 달다.", "어디?", "여기!"],
        ["α; β are two.", "why‽", "what⁇"],
    ],
    ids=lambda sentences: ascii(sentences[0][0]),
)
@pytest.mark.parametrize("space", [" ", "  ", "\n"])
def test_sentences_end_in_every_script(sentences, space):
    text = space.join(sentences)
    spans = list(sentence_spans(text))
    assert [text[start:end].strip() for start, end in spans] == sentences
    assert "".join(text[start:end] for start, end in spans) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("水甜。“在哪？”「这里！」对。", ["水甜。", "“在哪？”", "「这里！」", "对。"]),
        ("पानी है।कहाँ।(यहाँ।)दो।", ["पानी है।", "कहाँ।", "(यहाँ।)", "दो।"]),
        ("ជា។នៅ៕", ["ជា។", "នៅ៕"]),
        ("see example.org or a.b?c=d!e", ["see example.org or a.b?c=d!e"]),
        ("\n\n ", []),
        ("", []),
    ],
    ids=ascii,
)
def test_where_no_space_follows(text, expected):
    assert [text[start:end] for start, end in sentence_spans(text)] == expected


@pytest.mark.parametrize(
    ("unit", "ending"),
    [
        ("ภาษาไทยไม่มีเครื่องหมาย ", " "),
        ("ខ្មែរ\u200b", "\u200b"),
        ("བོད་", "་"),
        ("没有句号的长文字，", "，"),
        ("ሀለሐ፣", "፣"),
    ],
    ids=ascii,
)
def test_what_has_no_end_is_cut_where_a_word_or_a_phrase_ends(unit, ending):
    text = unit * 200
    sentences = [text[start:end] for start, end in sentence_spans(text)]
    assert "".join(sentences) == text
    assert all(sentence.endswith(ending) for sentence in sentences)
    assert all(400 - len(unit) < len(sentence) <= 400 for sentence in sentences[:-1])


@pytest.mark.parametrize("start", ["", "a。", "a. "], ids=ascii)
@pytest.mark.parametrize(
    "unit",
    [
        "abcdefg",
        "abc ",
        ". ",
        ".",
        "。",
        "।'",
        "“‘(«",
        ".”’)»",
        "。「『",
        "\n ",
        " ",
        "\u0301",
        "🇫",
    ],
    ids=ascii,
)
def test_time_is_linear(unit, start):
    assert is_linear(lambda size: list(sentence_spans(start + (unit * size)[:size])), 5_000)
