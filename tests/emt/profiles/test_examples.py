"""Questions about texts: from files, and made from texts."""

import json

import pytest

from emt.errors import ConfigError
from emt.profiles.examples import Example, make_examples, read_examples
from tests.timing import is_linear


def test_questions_from_files(tmp_path):
    article = {
        "title": "A_town",
        "paragraphs": [
            {"context": "It has a mill.", "qas": []},
            {
                "context": "The mill was built in 1720.",
                "qas": [
                    {"question": " When? ", "answers": [{"text": "1720", "answer_start": 22}]},
                    {"question": "Why?", "answers": []},
                ],
            },
        ],
    }
    (tmp_path / "s.json").write_text(json.dumps({"data": [article]}))
    (only,) = read_examples(tmp_path / "s.json")
    assert only.question == "When?"
    assert only.document[only.start : only.end] == "1720"
    assert only.document.startswith("A town\n\nIt has")
    rows = [
        {"context": "Ann met Bob.", "question": "Who?", "answer": "Bob"},
        {"context": "Ann met Bob.", "question": "Who?", "answer": "Eve"},
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_examples(tmp_path / "l.jsonl") == [Example("Ann met Bob.", "Who?", 8, 11)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[]", "none whose answer"),
        ("a.json", "[3]", "expected SQuAD"),
        ("a.json", '{"data": [{"title": "x"}]}', "expected SQuAD"),
        ("a.jsonl", '{"context": "c"}', "expected SQuAD"),
        ("a.jsonl", "3", "expected SQuAD"),
        ("a.jsonl", "{", "cannot be read"),
    ],
)
def test_files_without_questions(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_examples(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_examples(tmp_path / "none.json")


def test_made_questions_leave_the_answer_out():
    text = (
        "The castle above the river was built by Conrad of Wessen after the flood. It is old. "
        "Later owners repaired the tower and sold the western gardens in 1688."
    )
    first, second = make_examples([text])
    answers = {"Wessen": first, "1688": second}
    for answer, example in answers.items():
        assert text[example.start : example.end] == answer
        assert answer not in example.question
        assert example.document == text
    assert "castle above river built" in first.question
    assert second.question.startswith("Which number")
    assert make_examples([text]) == [first, second]


OTHER_SCRIPTS = {
    "russian": ("Вдоль всего канала садовник Лаптев посадил вишнёвые деревья. Да.", "Лаптев"),
    "greek": ("Δίπλα στο κανάλι ο κηπουρός Λεβέντης φύτεψε πολλές κερασιές; Ναι.", "Λεβέντης"),
    "arabic": ("زرع البستاني وائل أشجار الكرز على طول القناة. نعم.", "البستاني"),
    "hindi": ("माली विष्णुदास ने नहर के किनारे चेरी के पेड़ लगाए। हाँ।", "विष्णुदास"),
    "korean": ("정원사 최영호는 운하를 따라 심었다. 네.", "최영호는"),
    "chinese": ("园丁沿着整条运河种了很多棵樱桃树。", "桃树"),
    "numbers": ("运河在1688年开通，园丁沿着整条运河种了樱桃树。", "1688"),
    "japanese": ("運河に沿って庭師の佐藤が桜の木を植えました。", "佐藤"),
    "thai": ("ชาวสวนวิชัยปลูกต้นเชอร์รี่ริมคลองใหญ่ในเมือง", None),
    "khmer": ("អ្នកថែសួនដាំដើមឈើនៅតាមប្រឡាយធំក្នុងទីក្រុង។", None),
}


@pytest.mark.parametrize("script", OTHER_SCRIPTS)
def test_questions_are_made_in_every_script(script):
    text, answer = OTHER_SCRIPTS[script]
    (example,) = make_examples([text])
    left_out = text[example.start : example.end]
    assert answer in (left_out, None)
    words = example.question.partition(": ")[2].removesuffix("?").split()
    assert len(words) >= 4
    assert left_out not in words
    assert all(word in text for word in words)


def test_a_question_of_a_long_sentence_has_the_words_near_the_answer():
    words = [f"word{chr(97 + at // 26)}{chr(97 + at % 26)}" for at in range(60)]
    words[30] = "Conrad"
    (example,) = make_examples([" ".join(words)])
    assert example.question == f"Which name is it: {' '.join(words[18:30] + words[31:43])}?"


@pytest.mark.parametrize(
    "unit",
    ["abcdefg", "amber basin ", "Abcd Efgh ", "漢", "กำ", "अ. ", "A'b-", "12", "🇫"],
    ids=ascii,
)
def test_time_is_linear(unit):
    assert is_linear(lambda size: make_examples([(unit * size)[:size]]), 3_000)
