import dataclasses
import gzip
import json

import pytest
from experiments.items import FIELDS, Item, load_items, to_items

from emt.errors import DocumentError

ROW = {
    "id": "a",
    "title": "Whales",
    "split": "2k",
    "context": "The whale of Hull was weighed in Leeds. Leeds is small.",
    "question": "Where was the whale weighed?",
    "answer": "Leeds",
    "original_answer": "York",
    "source": "made up",
}


def write(folder, *rows):
    path = folder / "items.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_become_items_and_back_and_keep_unknown_fields(tmp_path):
    other = {**ROW, "id": "b", "original_answer": None}
    items = load_items(write(tmp_path, ROW, "", other))
    assert [item.id for item in items] == ["a", "b"]
    assert items[0].extra == {"source": "made up"}
    assert items[1].original_answer is None
    assert [item.to_row() for item in items] == [ROW, other]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    row = {**ROW, "context": "In Leeds\u2028it rained.\x85"}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_items(path)[0].context == row["context"]


def test_other_files_of_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [ROW, {**ROW, "id": "b", "original_answer": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "items.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    for name in ("items.parquet", "items.jsonl.gz", "mark.jsonl"):
        assert [item.to_row() for item in load_items(tmp_path / name)] == rows
    bad = [ROW, {**ROW, "id": "b", "answer": "Rome"}]
    parquet.write_table(pyarrow.Table.from_pylist(bad), tmp_path / "items.parquet")
    with pytest.raises(DocumentError, match=r"items.parquet' row 2: 'answer' 'Rome' is not in its"):
        load_items(tmp_path / "items.parquet")


def test_a_row_that_is_nested_too_deep_is_named(tmp_path):
    with pytest.raises(DocumentError, match="line 2: not JSON: too deep"):
        load_items(write(tmp_path, ROW, "[" * 100_000))


def test_white_space_around_an_answer_does_not_count():
    row = {**ROW, "answer": " Leeds\n", "original_answer": "York "}
    (item,) = to_items([("line 1", row)], source="x")
    assert (item.answer, item.original_answer) == ("Leeds", "York")


@pytest.mark.parametrize("field", FIELDS)
def test_a_row_without_a_field_is_named_with_its_line(tmp_path, field):
    bad = {key: value for key, value in ROW.items() if key != field}
    path = write(tmp_path, ROW, bad)
    with pytest.raises(DocumentError) as caught:
        load_items(path)
    assert str(caught.value) == (
        f"1 bad row in '{path}'. line 2: no field '{field}'. Correct them or leave them out."
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "Berlin"}, "'answer' 'Berlin' is not in its context"),
        ({"question": " "}, "'question' must be text; got ' '"),
        ({"context": 7}, "'context' must be text; got 7"),
        ({"title": "\ud800"}, "'title' must be text; got '\\ud800'"),
        (
            {"original_answer": "leeds "},
            "'answer' and 'original_answer' are both 'Leeds'",
        ),
    ],
)
def test_a_wrong_value_is_named(change, said):
    with pytest.raises(DocumentError, match="1 bad row in 'x'") as caught:
        to_items([("line 4", {**ROW, **change})], source="x")
    assert f"line 4: {said}." in str(caught.value)


def test_every_bad_row_gets_one_error(tmp_path):
    rows = [ROW, "{", [1], ROW, {**ROW, "id": "c", "answer": "x y z"}]
    with pytest.raises(DocumentError) as caught:
        load_items(write(tmp_path, *rows))
    said = str(caught.value)
    assert said.startswith("4 bad rows")
    assert "line 2: not JSON" in said
    assert "line 3: expected an object with id, title" in said
    assert "line 4: id 'a' is there already" in said
    assert "line 5: 'answer' 'x y z' is not in its context" in said


def test_many_bad_rows_are_counted_and_not_all_shown():
    with pytest.raises(DocumentError, match=r"7 bad rows .* and 2 more\.") as caught:
        to_items([(f"line {at}", {}) for at in range(7)], source="x")
    assert "line 4" in str(caught.value)
    assert "line 5" not in str(caught.value)


def test_nothing_is_an_error(tmp_path):
    with pytest.raises(DocumentError, match="has no items"):
        load_items(write(tmp_path, ""))
    with pytest.raises(DocumentError, match="cannot be read"):
        load_items(tmp_path / "missing.jsonl")


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
    item = Item("a", "t", "2k", context, "q?", answer)
    assert item.occurrences == count


def test_an_item_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        to_items([("line 1", ROW)], source="x")[0].id = "z"
