"""Questions about texts: from files, and made from texts."""

import json

import pytest

from emt.errors import ConfigError
from emt.profiles.examples import Example, make_examples, read_examples


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
