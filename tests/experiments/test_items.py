import gzip
import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from experiments.items import FIELDS, Item, chosen, load_items, says
from experiments.rows import read_rows

from emt.errors import ConfigError, DocumentError
from tests.experiments.fakes import item, write_rows

ROW = {
    "id": "a",
    "title": "Whales",
    "split": "2k",
    "context": "The whale of Hull was weighed in Leeds. Leeds is small.",
    "question": "Where was the whale weighed?",
    "answer": "Leeds",
    "original_answer": "York",
}
ITEMS = [item("a"), item("b", split="4k"), item("c")]


def test_rows_of_every_kind_of_file_become_items(tmp_path):
    rows = [{**ROW, "source": "made up"}, {**ROW, "id": "b", "original_answer": None}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "items.parquet")
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    for name in ("items.parquet", "items.jsonl.gz", "mark.jsonl"):
        first, second = load_items(tmp_path / name)
        assert first == Item(**ROW)
        assert (second.id, second.original_answer, second.candidates) == ("b", None, ["Leeds"])
    assert first.candidates == ["Leeds", "York"]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    row = {**ROW, "context": "In Leeds\u2028it rained.\x85\r"}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_items(path)[0].context == row["context"]


def test_white_space_around_an_answer_does_not_count(tmp_path):
    row = {**ROW, "answer": " Leeds\n", "original_answer": "York "}
    (only,) = load_items(write_rows(tmp_path / "items.jsonl", [row]))
    assert (only.answer, only.original_answer) == ("Leeds", "York")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "Berlin"}, "'answer' 'Berlin' is not in its context"),
        ({"question": " "}, "'question' must be text; got ' '"),
        ({"context": 7}, "'context' must be text; got 7"),
        ({"title": "\ud800"}, "'title' must be text; got '\\ud800'"),
        ({"original_answer": "leeds "}, "'answer' and 'original_answer' are both 'leeds'"),
        ({"id": "a"}, "id 'a' comes twice"),
    ],
)
def test_a_wrong_value_is_named_with_its_row(tmp_path, change, said):
    path = write_rows(tmp_path / "items.jsonl", [ROW, {**ROW, "id": "b", **change}])
    with pytest.raises(DocumentError) as caught:
        load_items(path)
    assert f"'{path}' row 2: {said}." in str(caught.value)


@pytest.mark.parametrize("field", FIELDS)
def test_a_row_without_a_field_is_named(tmp_path, field):
    bad = {key: value for key, value in ROW.items() if key != field}
    with pytest.raises(DocumentError, match=f"row 2 has no field '{field}'; its fields are"):
        load_items(write_rows(tmp_path / "items.jsonl", [ROW, bad]))


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("x.jsonl", None, DocumentError, "there is no such file"),
        ("x.jsonl", b"\n", DocumentError, "has no rows"),
        ("x.jsonl", b"[1]\n", DocumentError, "row 1 must be an object; got a list"),
        ("x.jsonl", b"{\n", DocumentError, "row 1 is not JSON"),
        ("x.jsonl", b"{}\n" + b"[" * 100_000, DocumentError, "row 2 is not JSON"),
        ("x.jsonl", b"\xff", DocumentError, "cannot be read after row 0"),
        ("x.jsonl.gz", b"{}", DocumentError, "cannot be read after row 0"),
        ("x.parquet", b"PAR1", DocumentError, "cannot be read as Parquet"),
        ("x.csv", b"a,b", ConfigError, r"expected a \.jsonl, \.jsonl\.gz or \.parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, error, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("context", "answer", "count"),
    [
        ("Ford affords a ford. Ford's!", "Ford", 3),
        ("in 1066, 10665 and 1066", "1066", 2),
        ("unfordable", "ford", 1),
        ("A (b) c (b)", "(b)", 2),
        ("東京は雨。東京へ", "東京", 2),
    ],
)
def test_occurrences_are_whole_words_whatever_their_case(context, answer, count):
    assert Item("a", "t", "2k", context, "q?", answer).occurrences == count


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It was LEEDS.", "Leeds", True),
        ("Le eds", "Leeds", False),
        ("", "Leeds", False),
        ("The year 1,066.", "1066", False),  # as published: no normalisation
        ("in 10661", "1066", True),
        ("Straße", "STRASSE", False),
    ],
)
def test_the_published_score(text, answer, right):
    assert says(text, answer) is right


def test_the_first_items_of_each_split_are_chosen():
    assert [one.id for one in chosen(ITEMS, None, 1)] == ["a", "b"]
    assert [one.id for one in chosen(ITEMS, ["2k"], None)] == ["a", "c"]
    with pytest.raises(ConfigError, match=r"no items of split '8k'. The splits are 2k, 4k\."):
        chosen(ITEMS, ["8k"], None)
