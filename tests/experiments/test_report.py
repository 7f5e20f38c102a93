import re

import numpy as np
import pytest
from experiments.retrieval import plots
from experiments.retrieval.report import (
    bin_of,
    compare,
    nats,
    percent,
    summary,
    table,
    with_gains,
)
from experiments.statistics import Estimate

from emt.errors import ConfigError

HEADER = {
    "experiment": "retrieval",
    "machine": "a machine",
    "versions": {"torch": "2"},
    "revision": "abc",
    "settings": {
        "model": "tiny",
        "items": "items.jsonl",
        "items_sha256": "00ff",
        "memory": {"topk": 4},
        "conditions": {"closed_book": None, "small": {"kind": "emt", "memory": {"topk": 1}}},
        "baseline": "closed_book",
        "seed": 0,
    },
}


def record(split, name, condition, right, log_prob, original=-3.0, **changes):
    return {
        "id": name,
        "split": split,
        "condition": condition,
        "occurrences": 1,
        "right": right,
        "log_prob": log_prob,
        "original_log_prob": original,
        "preferred": None if log_prob is None else log_prob > original,
        "num_prompt_tokens": 10,
        "truncated": False,
        "has_answer": None,
        "is_cited": None,
        "seconds": 1.0,
        "memory_seconds": None,
        "text": f"{name} {right}",
        **changes,
    }


RECORDS = [
    record("2k", "a", "closed_book", False, -4.0),
    record("2k", "a", "document", True, -1.0, truncated=True, has_answer=True),
    record("2k", "a", "emt_manual", True, -2.0, memory_seconds=3.0),
    record("2k", "a", "emt_vector_db", True, -2.25, memory_seconds=3.0),
    record("4k", "b", "closed_book", False, -5.0, occurrences=5),
    record("4k", "b", "document", False, -6.0, truncated=True, has_answer=False, occurrences=5),
    record("4k", "b", "emt_manual", True, -3.5, occurrences=5),
    record("4k", "b", "emt_vector_db", False, -3.5, occurrences=5),
    record("4k", "c", "closed_book", True, -1.0, occurrences=5),
    record("4k", "c", "emt_manual", True, -1.0, occurrences=5),
]
ITEMS = {f"{r['split']}/{r['id']}/{r['condition']}": r for r in RECORDS}


def rows_of(text, heading):
    """Return a section's table: (first cells) -> the other cells."""
    section = text.split(f"## {heading}", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_gains_are_over_the_same_item_s_closed_book():
    gains = [one["gain"] for one in with_gains(RECORDS)]
    assert gains == [0, 3, 2, 1.75, 0, -1, 1.5, 1.5, 0, 0]
    alone = with_gains([RECORDS[1], record("2k", "a", "closed_book", True, None)])
    assert [one["gain"] for one in alone] == [None, None]


def test_differences_are_of_pairs_only():
    found = compare(RECORDS, "document", "emt_manual", "log_prob", "all")
    assert (found.mean, found.count) == (((-1 + 2) + (-6 + 3.5)) / 2, 2)
    assert compare(RECORDS, "document", "emt_manual", "right", "4k").mean == -1
    assert compare(RECORDS, "document", "rag", "right", "all").count == 0


def test_the_summary_says_what_was_found():
    text = summary(HEADER, ITEMS)
    results = {(row[0], row[1]): row[2:] for row in rows_of(text, "Results")}
    assert list(results)[:4] == [
        ("2k", name) for name in ("closed_book", "document", "emt_manual", "emt_vector_db")
    ]
    assert results["2k", "emt_manual"] == [
        "1",
        "100.0 [100.0, 100.0]",
        "100.0 [100.0, 100.0]",
        "-2.00 [-2.00, -2.00]",
        "+2.00 [+2.00, +2.00]",
        "0",
        "",
        "",
        "10",
        "1.00",
        "3.0",
    ]
    assert results["all", "document"][:2] == ["2", "50.0 [0.0, 100.0]"]
    assert results["all", "document"][5:8] == ["2 (1)", "1 of 2", ""]
    differences = {(row[0], row[1]): row[2:] for row in rows_of(text, "Against closed_book")}
    assert ("all", "closed_book") not in differences
    assert differences["all", "document"][:2] == ["2", "+50.0 [+0.0, +100.0]"]
    agreement = rows_of(text, "emt_vector_db and emt_manual")
    assert agreement == [
        ["2k", "1", "+0.0", "+0.0", "100 %", "0.25"],
        ["4k", "1", "-100.0", "+0.0", "0 %", "0"],
        ["all", "2", "-50.0", "+0.0", "50 %", "0.25"],
    ]
    often = {row[0]: row[1:] for row in rows_of(text, "By how often")}
    assert often["emt_manual"] == ["100 % (100 %), 1", "100 % (50 %), 2"]
    assert "a machine" in text
    assert '* memory: {"topk": 4}\n' in text
    assert '* small: {"kind": "emt", "memory": {"topk": 1}}\n' in text
    assert "* closed_book" not in text


def test_one_split_has_no_row_for_all():
    text = summary(HEADER, {key: found for key, found in ITEMS.items() if key.startswith("2k")})
    assert {row[0] for row in rows_of(text, "Results")} == {"2k"}


def test_forms():
    found = Estimate(0.5, 0.25, 0.75, 4)
    assert percent(found) == "50.0 [25.0, 75.0]"
    assert percent(found, signed=True) == "+50.0 [+25.0, +75.0]"
    assert nats(found) == "+0.50 [+0.25, +0.75]"
    nothing = Estimate(float("nan"), float("nan"), float("nan"), 0)
    assert (percent(nothing), nats(nothing)) == ("", "")
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert [bin_of(times) for times in (1, 2, 3, 4, 6, 7, 50)] == [
        "1",
        "2",
        "3",
        "4-6",
        "4-6",
        "7+",
        "7+",
    ]


def test_the_heat_map_s_cells():
    found = plots.cells(RECORDS, "document", "right")
    expected = np.full((5, 2), np.nan)
    expected[0, 0], expected[3, 1] = 1, 0
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("without", [(), ("log_prob", "original_log_prob", "preferred")])
def test_the_pictures_are_drawn(tmp_path, without):
    items = {key: {**one, **dict.fromkeys(without)} for key, one in ITEMS.items()}
    found = plots.draw(HEADER, items, tmp_path / "new")
    assert [path.name for path in found] == ["retrieval.png", "occurrences.png"]
    for path in found:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        assert width > 500
        assert height > 300


def test_nothing_cannot_be_drawn(tmp_path):
    with pytest.raises(ConfigError, match="no results to draw"):
        plots.draw(HEADER, {}, tmp_path)
    assert re.search(r"items: 0 of", summary(HEADER, {}))
