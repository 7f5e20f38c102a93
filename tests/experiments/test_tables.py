from experiments.tables import (
    COUNT,
    average,
    difference,
    grouped,
    interval,
    origin,
    records_table,
)

RECORDS = [
    {"rows": 2000, "way": "a", "id": 1, "right": True, "log_prob": -1.0},
    {"rows": 2000, "way": "a", "id": 2, "right": False, "log_prob": None},
    {"rows": 2000, "way": "b", "id": 2, "right": True, "log_prob": -2.5},
]


def test_a_table_has_a_row_a_group_and_a_column_a_measure():
    columns = [
        COUNT,
        interval("right, %", "right", ".0f", 100),
        average("log-prob", "log_prob", "+.2f"),
        average("double", lambda record: 2 * record["id"], ".1f"),
    ]
    text = records_table(grouped(RECORDS, "rows", "way"), ["rows", "way"], columns)
    assert text.splitlines() == [
        "| rows | way | n | right, % | log-prob | double |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 2,000 | a | 2 | 50 [0, 100] | -1.00 | 3.0 |",
        "| 2,000 | b | 1 | 100 [100, 100] | -2.50 | 4.0 |",
    ]


def test_differences_are_of_the_same_items_only():
    column = difference("right", "right", RECORDS[:2], ["id"], form="+.0f", scale=100)
    assert column.cell(RECORDS[2:]) == "+100 [+100, +100]"
    assert column.cell([{"id": 3, "right": True}]) == ""
    log_probs = difference("log-prob", "log_prob", RECORDS[:2], ["id"])
    assert log_probs.cell(RECORDS[2:]) == ""  # the other one has none


def test_the_origin_names_settings_machine_versions_and_code():
    header = {"machine": "a machine", "versions": {"torch": "2"}, "revision": "abc"}
    header["settings"] = {"model": "tiny", "memory": {"topk": 4}, "others": {}}
    lines = origin(header, "model", "memory", "others", "wording").splitlines()
    assert lines[:2] == ["* model: tiny", '* memory: {"topk": 4}']
    assert lines[2:] == ["* machine: a machine", "* versions: torch 2", "* code: abc"]
