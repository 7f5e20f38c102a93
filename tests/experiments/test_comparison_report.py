"""The comparison's tables and picture."""

from experiments.comparison.report import draw, summary

HEADER = {
    "experiment": "comparison",
    "machine": "a machine",
    "versions": {"torch": "2"},
    "revision": "abc",
    "settings": {"model": "tiny", "memory": {"stride": 64}, "embedding_model": None},
}


def record(condition, name, right, log_prob=-1.0, **changes):
    return {
        **{"memory": "squad", "size": "64k", "set": "squad", "id": name, "kind": None},
        **{"condition": condition, "has_answer": True, "found": right, "found_any": True},
        **{"first_document": True, "recalled": 384, "is_relevant": None, "right": right},
        **{"told_without_document": None, "routing_seconds": 0.5, "first_token_seconds": 1.5},
        **{"log_prob": log_prob, "preferred": None, "is_cited": None, **changes},
    }


def missing(condition, name, told):
    record = {"memory": "squad", "size": "64k", "set": "near", "id": name, "found": None}
    return {
        **record,
        "condition": condition,
        "is_relevant": not told,
        "recalled": 0,
        "first_document": None,
        "told_without_document": None,
        "routing_seconds": 0.5,
    }


RECORDS = [
    record("closed_book", "a", False, -4.0, found=None, first_document=None, recalled=0),
    record("closed_book", "b", False, -5.0, found=None, first_document=None, recalled=0),
    record("rag_hybrid", "a", True, -2.0),
    record("rag_hybrid", "b", False, -3.0),
    record("passages", "a", True, -1.0, is_relevant=True, is_cited=True),
    record("passages", "b", True, -1.0, is_relevant=False, told_without_document=True),
    missing("passages", "c", True),
    missing("passages", "d", False),
]
ITEMS = {str(number): one for number, one in enumerate(RECORDS)}


def rows_of(table):
    """Return a table: heading of the first column -> heading of others -> cell."""
    lines = [line[1:-1].split("|") for line in table.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def test_the_overview_has_a_row_a_condition_and_a_column_a_set():
    text = summary(HEADER, ITEMS)
    overview = text.split("## Overview, memory size 64k\n")[1].split("\n## ")[0]
    assert rows_of(overview) == [
        {"condition": "closed_book", "squad: right, %": "0", "near: told, %": ""},
        {"condition": "rag_hybrid", "squad: right, %": "50", "near: told, %": ""},
        {"condition": "passages", "squad: right, %": "100", "near: told, %": "50"},
    ]
    assert '* memory: {"stride": 64}' in text


def test_a_set_has_a_table_and_differences_to_hybrid_retrieval():
    squad, near = summary(HEADER, ITEMS).split("\n## squad\n")[1].split("\n## near\n")
    table, differences = squad.split("Less rag_hybrid, question by question:")
    passages = rows_of(table)[2]
    assert passages["n"] == "2"
    assert passages["right, %"] == "100 [100, 100]"
    assert passages["nats"] == "-1.00 [-1.00, -1.00]"
    assert passages["cited, %"] == "100"
    assert passages["told, %"] == "50 [0, 100]"
    assert passages["told without document, %"] == "100 [100, 100]"
    assert (passages["tokens"], passages["s first token"]) == ("384", "1.50")
    assert "preferred, %" not in passages  # nothing to tell
    closed, less = rows_of(differences)
    assert (closed["condition"], closed["found, points"]) == ("closed_book", "")
    assert (less["right, points"], less["nats"]) == ("+50 [+0, +100]", "+1.50 [+1.00, +2.00]")
    (told,) = rows_of(near)
    assert (told["condition"], told["told, %"]) == ("passages", "50 [0, 100]")
    assert "right, %" not in told


def test_the_picture_is_drawn(tmp_path):
    both = {**ITEMS, "large": record("passages", "a", True, size="1M")}
    for items in (ITEMS, both):
        (path,) = draw(HEADER, items, tmp_path / "new")
        assert path.name == "comparison.png"
        assert path.read_bytes().startswith(b"\x89PNG")
