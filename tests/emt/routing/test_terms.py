"""The words of texts in many scripts."""

import unicodedata

import pytest

from emt.routing.terms import terms_of


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The dog of Anna's aunt, 5 years old", "dog anna aunt 5 year old"),
        ("dogs, houses, bodies; bus, glass, yes, keeps", "dog house body bus glass yes keep"),
        ("Crème brûlée, STRASSE; Straße; ΣΟΦΟΣ σοφός", "creme brulee strasse strasse σοφοσ σοφοσ"),
        ("ёлка в Й", "елка в и"),
        ("\uff30\uff34 \uff11\uff12 \ufb01n snake_case", "pt 12 fin snake case"),
        ("दादी के कुत्ते का नाम", "दादी के कुत्ते का नाम"),
        ("நாய்க்குட்டி తెలుగు", "நாய்க்குட்டி తెలుగు"),
        ("الْكِتَابُ شَـلام", "الكتاب شلام"),
        ("שָׁלוֹם", "שלום"),
        ("狗叫", "狗 狗叫 叫"),
        ("狗。叫", "狗 叫"),
        ("iPhone手机5号", "iphone 手 手机 机 5 号"),
        ("ゲーム ｹﾞｰﾑ", "ゲ ゲー ー ーム ム ゲ ゲー ー ーム ム"),
        ("개는 이름", "개 개는 는 이 이름 름"),
        ("สุนัข", "สุ สุนั นั นัข ข"),
        ("ຫມາ", "ຫ ຫມ ມ ມາ າ"),
        ("ឆ្កែ", "ឆ្ ឆ្កែ កែ"),
        ("ခွေး", "ခွေး"),
        ("", ""),
        ("the and ?! _ \u0640", ""),
    ],
)
def test_terms(text, terms):
    assert terms_of(text) == terms.split()
    for form in ("NFD", "NFKC"):
        assert terms_of(unicodedata.normalize(form, text)) == terms.split()


def test_case_makes_no_difference():
    for text in ("Großer HUND", "ÇAĞRI", "Ωμέγα"):
        assert terms_of(text) == terms_of(text.upper()) == terms_of(text.lower())
