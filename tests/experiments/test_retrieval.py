import pytest
from experiments.results import read_results
from experiments.retrieval.report import draw, summary
from experiments.retrieval.run import run_retrieval
from experiments.retrieval.settings import RetrievalSettings

from emt.errors import ConfigError, DocumentError
from tests.experiments.fakes import Parrot, item, tiny, write_items

ALL = ["closed_book", "document", "emt_manual", "emt_vector_db", "rag", "rag_emt"]
ITEMS = [item("a"), item("b", split="4k"), item("c")]


@pytest.fixture
def items(tmp_path):
    return str(write_items(tmp_path / "items.jsonl", ITEMS))


def settings(items, **changes):
    return RetrievalSettings(**{"items": items, "chunk_tokens": 20, "chunks": 2, **changes})


def run(asked, folder, responder=None):
    """Run with a responder; without one, none may be needed."""
    return run_retrieval(asked, folder, None, responding=responder and (lambda *_: responder))


def test_every_item_is_asked_under_every_condition(items, tmp_path):
    out = tmp_path / "out"
    results = run(settings(items), out, tiny(max_new_tokens=5))
    assert list(results.items) == [
        f"{one.split}/{one.id}/{condition}" for one in ITEMS for condition in ALL
    ]
    assert [path.name for path in out.iterdir()] == ["results.jsonl"]  # no store is left
    for record in results.items.values():
        assert record["log_prob"] < 0
        assert record["occurrences"] == 1
        assert record["preferred"] == (record["log_prob"] > record["original_log_prob"])
        assert (record["memory_seconds"] is not None) == ("emt" in record["condition"])
        assert record["has_answer"] is {"document": True}.get(record["condition"]) or (
            "rag" in record["condition"]
        )
    for one in ITEMS:
        vector, manual = (
            results.items[f"{one.split}/{one.id}/emt_{name}"] for name in ("vector_db", "manual")
        )
        assert vector["text"] == manual["text"]
        assert vector["log_prob"] == pytest.approx(manual["log_prob"], abs=1e-5)
    header, kept = read_results(out / "results.jsonl")
    assert (header, kept) == (results.header, results.items)
    assert header["settings"]["chunk_tokens"] == 20


def test_it_goes_on_where_it_was_stopped(items, tmp_path):
    asked = settings(items, conditions=["closed_book", "document", "rag"])
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path, Parrot(log_probs=(-1.0, -2.0), stop_after=4))
    before = (tmp_path / "results.jsonl").read_bytes()
    assert before.count(b"\n") == 5
    second = Parrot(log_probs=(-1.0, -2.0))
    results = run(asked, tmp_path, second)
    assert (len(second.heard), len(results)) == (5, 9)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    run(asked, tmp_path)  # nothing left: no model is loaded


def test_another_limit_asks_what_is_missing_and_not_what_is_there(tmp_path):
    path = write_items(tmp_path / "items.jsonl", [item("a"), item("c"), item("b", split="4k")])
    asked = {"conditions": ["closed_book", "document"]}
    with pytest.raises(KeyboardInterrupt):  # after the first split: as many as limit=1 asks
        run(settings(str(path), **asked), tmp_path, Parrot(stop_after=4))
    second = Parrot()
    few = settings(str(path), limit=1, **asked)
    results = run(few, tmp_path, second)
    assert list(results.items)[4:] == ["4k/b/closed_book", "4k/b/document"]
    assert len(second.heard) == 2
    run(few, tmp_path)  # the file has more, and nothing is missing


def test_results_of_other_settings_or_items_are_refused(items, tmp_path):
    options = {"conditions": ["closed_book"]}
    run(settings(items, **options), tmp_path, Parrot())
    with pytest.raises(ConfigError, match="chunks 2 \\(now 3\\)"):
        run(settings(items, chunks=3, **options), tmp_path, Parrot())
    write_items(tmp_path / "items.jsonl", ITEMS[:2])
    with pytest.raises(ConfigError, match="items_sha256"):
        run(settings(items, **options), tmp_path, Parrot())


def test_a_model_without_log_probs_is_scored_by_its_text(items, tmp_path):
    results = run(
        settings(items, conditions=["closed_book", "document"]), tmp_path, Parrot(words=40)
    )
    rights = [record["right"] for record in results.items.values()]
    assert rights == [False, True] * 3
    assert {record["preferred"] for record in results.items.values()} == {None}
    text = summary(results.header, results.items)
    assert "| all | document | 3 | 100.0 [100.0, 100.0] |  |  |  | 0 | 3 of 3 |" in text
    assert "## By how often the document has the answer" in text


def test_bad_items_stop_it_before_a_model_is_loaded(tmp_path):
    path = write_items(tmp_path / "items.jsonl", [item(answer="Rome")])
    with pytest.raises(DocumentError, match="row 1: 'answer' 'Rome' is not in its context"):
        run(settings(str(path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


HEADER = {
    "experiment": "retrieval",
    "machine": "a machine",
    "versions": {"torch": "2"},
    "revision": "abc",
    "settings": {
        "model": "tiny",
        "items": "items.jsonl",
        "memory": {"topk": 4},
        "conditions": {"closed_book": None, "small": {"kind": "emt", "memory": {"topk": 1}}},
        "baseline": "closed_book",
    },
}


def record(split, name, condition, right, log_prob, **changes):
    return {
        **{"id": name, "split": split, "condition": condition, "occurrences": 1, "right": right},
        **{"log_prob": log_prob, "original_log_prob": -3.0, "num_prompt_tokens": 10},
        **{"preferred": log_prob > -3, "truncated": False, "has_answer": None},
        **{"seconds": 1.0, "memory_seconds": None, "text": f"{name} {right}", **changes},
    }


RECORDS = [
    record("2k", "a", "closed_book", False, -4.0),
    record("2k", "a", "document", True, -1.0, truncated=True, has_answer=True),
    record("2k", "a", "small", True, -2.0, memory_seconds=3.0),
    record("4k", "b", "closed_book", False, -5.0, occurrences=5),
    record("4k", "b", "document", False, -6.0, truncated=True, has_answer=False, occurrences=5),
    record("4k", "b", "small", True, -3.5, occurrences=5),
    record("4k", "c", "closed_book", True, -1.0, occurrences=5),
    record("4k", "c", "small", True, -1.0, occurrences=5),
]
RECORDS = {f"{r['split']}/{r['id']}/{r['condition']}": r for r in RECORDS}


def rows_of(text, heading):
    """Return a section's table: the cells of each row."""
    section = text.split(f"## {heading}", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_summary_has_a_row_a_condition_by_split_and_over_all():
    text = summary(HEADER, RECORDS)
    results = {(row[0], row[1]): row[2:] for row in rows_of(text, "Results")}
    assert list(results)[:3] == [("2k", name) for name in ("closed_book", "document", "small")]
    assert list(results)[-1] == ("all", "small")
    certain = ["100.0 [100.0, 100.0]"] * 2 + ["-2.00 [-2.00, -2.00]", "+2.00 [+2.00, +2.00]"]
    assert results["2k", "small"] == ["1", *certain, "0", "", "10", "1.00", "3.0"]
    assert results["all", "document"][:2] == ["2", "50.0 [0.0, 100.0]"]
    assert results["all", "document"][5:7] == ["2 (1)", "1 of 2"]
    differences = {(row[0], row[1]): row[2:] for row in rows_of(text, "Against closed_book")}
    assert ("all", "closed_book") not in differences
    assert differences["all", "document"][:2] == ["2", "+50.0 [+0.0, +100.0]"]
    often = {row[0]: row[1:] for row in rows_of(text, "By how often")}
    assert often["small"] == ["100 (100), 1", "100 (50), 2"]
    assert '* memory: {"topk": 4}\n' in text
    assert '* small: {"kind": "emt", "memory": {"topk": 1}}\n' in text
    assert "* closed_book" not in text
    of_one = summary(HEADER, {k: r for k, r in RECORDS.items() if k.startswith("2k")})
    assert {row[0] for row in rows_of(of_one, "Results")} == {"2k"}


@pytest.mark.parametrize("without", [(), ("log_prob", "original_log_prob", "preferred")])
def test_the_plot_is_drawn(tmp_path, without):
    items = {key: {**one, **dict.fromkeys(without)} for key, one in RECORDS.items()}
    (path,) = draw(HEADER, items, tmp_path / "new")
    assert path.name == "retrieval.png"
    assert path.read_bytes().startswith(b"\x89PNG")
