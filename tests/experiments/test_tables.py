"""Rows from every source, in our names; a fault names file, row and field."""

import gzip
import json

import pytest
from experiments.tables import read_rows

from emt.errors import ConfigError, DocumentError

ROWS = [{"passage": "Koch spoke.", "question": "Who?", "label": "Koch"}] * 2
OURS = [{"context": "Koch spoke.", "question": "Who?", "answer": "Koch"}] * 2
COLUMNS = {"context": "passage", "answer": "label"}
REQUIRED = ("context", "question", "answer")


def lines():
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def test_json_lines_plain_and_packed(tmp_path):
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    plain.write_text("\n" + lines(), encoding="utf-8")
    packed.write_bytes(gzip.compress(lines().encode()))
    for path in (plain, str(packed)):
        assert list(read_rows(path, required=REQUIRED, columns=COLUMNS)) == OURS


def test_any_iterable_of_mappings():
    found = list(read_rows(iter(ROWS), required=REQUIRED, columns=COLUMNS))
    assert found == OURS
    assert [row.origin for row in found] == ["data set row 1", "data set row 2"]


def test_columns_may_swap():
    (row,) = read_rows([{"a": 1, "b": 2}], columns={"a": "b", "b": "a"})
    assert row == {"a": 2, "b": 1}


@pytest.mark.filterwarnings("ignore")  # of what datasets itself imports
def test_a_dataset_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    found = read_rows(datasets.Dataset.from_list(ROWS), required=REQUIRED, columns=COLUMNS)
    assert list(found) == OURS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read_rows(path, required=REQUIRED, columns=COLUMNS)) == OURS
    path.write_bytes(b"PAR1 and nothing")
    with pytest.raises(DocumentError, match=r"rows.parquet' cannot be read as Parquet"):
        list(read_rows(path))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pip install 'emt\[experiments\]'"):
        list(read_rows(path))


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines() + '{"passage": "x", "question": null}\n', encoding="utf-8")
    with pytest.raises(
        DocumentError, match=r"rows.jsonl' row 3 has no field 'question'; .*passage"
    ):
        list(read_rows(path, required=("context", "question"), columns=COLUMNS))
    with pytest.raises(DocumentError, match=r"no field 'answer' \(column 'gold'\)"):
        list(read_rows(ROWS, required=("answer",), columns={"answer": "gold"}))


def test_a_field_that_is_no_text():
    (row,) = read_rows([{"context": 3}])
    with pytest.raises(DocumentError, match="row 1: field 'context' must be text; got 3"):
        row.text("context")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b"{}\n{", DocumentError, "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", DocumentError, "row 1 must be a mapping; got list"),
        ("a.jsonl", b"\xff\xfe\n", DocumentError, "cannot be read"),
        ("a.jsonl.gz", b"no gzip", DocumentError, "cannot be read"),
        ("a.csv", b"", ConfigError, "expected a .jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, error, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        list(read_rows(path))


def test_a_missing_file_and_a_bad_mapping():
    with pytest.raises(DocumentError, match="does not exist"):
        list(read_rows("nowhere.jsonl"))
    with pytest.raises(ConfigError, match="columns must map names to names"):
        list(read_rows(ROWS, columns={"context": 3}))
