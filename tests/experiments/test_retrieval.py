import json

import pytest
from experiments.items import chosen
from experiments.results import read_results
from experiments.retrieval import experiment as retrieval
from experiments.retrieval.experiment import run_retrieval
from experiments.retrieval.report import compare, summary
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


class Watching:
    """Counts what another responder is asked, and stops after some answers."""

    def __init__(self, responder, stop_after=None):
        self.responder, self.asked, self.stop_after = responder, 0, stop_after

    def __getattr__(self, name):
        return getattr(self.responder, name)

    def respond(self, message, candidates=()):
        if self.asked == self.stop_after:
            raise KeyboardInterrupt
        self.asked += 1
        return self.responder.respond(message, candidates)


def test_every_item_is_asked_under_every_condition(items, tmp_path):
    out = tmp_path / "out"
    results = run_retrieval(settings(items), out, loading=lambda _: tiny(max_new_tokens=5))
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
    records = list(results.items.values())
    for name in ("right", "log_prob"):
        apart = compare(records, "emt_vector_db", "emt_manual", name, "all")
        assert apart.count == 3
        assert abs(apart.mean) < 1e-5
    header, kept = read_results(out / "results.jsonl")
    assert (header, kept) == (results.header, results.items)
    assert header["settings"]["chunk_tokens"] == 20


def test_it_goes_on_where_it_was_stopped(items, tmp_path):
    asked = settings(items, conditions=["closed_book", "document", "rag"])
    first = Watching(Parrot(log_probs=(-1.0, -2.0)), stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_retrieval(asked, tmp_path, loading=lambda _: first)
    before = (tmp_path / "results.jsonl").read_bytes()
    assert before.count(b"\n") == 5
    second = Watching(Parrot(log_probs=(-1.0, -2.0)))
    results = run_retrieval(asked, tmp_path, loading=lambda _: second)
    assert (second.asked, len(results)) == (5, 9)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    third = Watching(Parrot())
    run_retrieval(asked, tmp_path, loading=lambda _: third)
    assert third.asked == 0
    run_retrieval(asked, tmp_path, loading=None)  # nothing left: no model is loaded


def test_another_limit_asks_what_is_missing_and_not_what_is_there(tmp_path):
    path = write_items(tmp_path / "items.jsonl", [item("a"), item("c"), item("b", split="4k")])
    asked = {"conditions": ["closed_book", "document"]}
    first = Watching(Parrot(), stop_after=4)  # all of the first split: as many as limit=1 asks
    with pytest.raises(KeyboardInterrupt):
        run_retrieval(settings(str(path), **asked), tmp_path, loading=lambda _: first)
    second = Watching(Parrot())
    few = settings(str(path), limit=1, **asked)
    results = run_retrieval(few, tmp_path, loading=lambda _: second)
    assert list(results.items)[4:] == ["4k/b/closed_book", "4k/b/document"]
    assert second.asked == 2
    run_retrieval(few, tmp_path, loading=None)  # the file has more, and nothing is missing


def test_another_limit_makes_another_memory_of_many_documents(tmp_path):
    path = write_items(tmp_path / "items.jsonl", [item("a"), item("c")])
    asked = {"conditions": ["closed_book"], "sizes": [11]}
    run_retrieval(settings(str(path), limit=1, **asked), tmp_path, loading=lambda _: Parrot())
    with pytest.raises(ConfigError, match="limit 1 \\(now 2\\)"):
        run_retrieval(settings(str(path), limit=2, **asked), tmp_path, loading=lambda _: Parrot())


def test_results_of_other_settings_or_items_are_refused(items, tmp_path):
    options = {"conditions": ["closed_book"]}
    run_retrieval(settings(items, **options), tmp_path, loading=lambda _: Parrot())
    with pytest.raises(ConfigError, match="seed 0 \\(now 1\\)"):
        run_retrieval(settings(items, seed=1, **options), tmp_path, loading=lambda _: Parrot())
    write_items(tmp_path / "items.jsonl", ITEMS[:2])
    with pytest.raises(ConfigError, match="items_sha256"):
        run_retrieval(settings(items, **options), tmp_path, loading=lambda _: Parrot())


def test_a_model_without_log_probs_is_scored_by_its_text(items, tmp_path):
    responder = Parrot(words=40)
    conditions = ["closed_book", "document"]
    results = run_retrieval(
        settings(items, conditions=conditions), tmp_path, loading=lambda _: responder
    )
    rights = [record["right"] for record in results.items.values()]
    assert rights == [False, True] * 3
    assert {record["preferred"] for record in results.items.values()} == {None}
    text = summary(results.header, results.items)
    assert "| all | document | 3 | 100.0 [100.0, 100.0] |  |  |  | 0 |" in text


def test_many_documents_are_asked_in_one_memory(tmp_path):
    path = write_items(tmp_path / "items.jsonl", [item("a"), item("z", title="title a"), item("c")])
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.txt").write_text("It snowed on the harbour all night. " * 9)
    found = settings(
        str(path),
        sizes=[160, 300],
        distractors=[str(tmp_path / "others")],
        conditions=["closed_book", "emt_manual", "emt_vector_db", "rag"],
    )
    results = run_retrieval(found, tmp_path / "out", loading=lambda _: tiny(max_new_tokens=4))
    assert results.header["settings"]["left_out"] == {"same_article": 1, "no_room": 0}
    assert [key for key in results.items if key.endswith("rag")] == [
        "0.16k/a/rag",
        "0.16k/c/rag",
        "0.3k/a/rag",
        "0.3k/c/rag",
    ]
    at = {key: record["log_prob"] for key, record in results.items.items()}
    for size in ("0.16k", "0.3k"):
        manual, vector = (at[f"{size}/a/emt_{name}"] for name in ("manual", "vector_db"))
        assert manual == pytest.approx(vector, abs=1e-4)
    assert at["0.16k/a/closed_book"] == at["0.3k/a/closed_book"]
    assert at["0.16k/a/emt_manual"] != pytest.approx(at["0.3k/a/emt_manual"], abs=1e-6)
    assert "left out: 1 items whose change" in summary(results.header, results.items)
    (tmp_path / "others" / "x.txt").write_text("It rained on the harbour all night. " * 9)
    with pytest.raises(ConfigError, match="documents_sha256"):
        run_retrieval(found, tmp_path / "out", loading=lambda _: tiny(max_new_tokens=4))


def test_the_first_items_of_each_split_are_chosen():
    assert [one.id for one in chosen(ITEMS, None, 1)] == ["a", "b"]
    assert [one.id for one in chosen(ITEMS, ["2k"], None)] == ["a", "c"]
    with pytest.raises(ConfigError, match=r"no items of split '8k'. The splits are 2k, 4k\."):
        chosen(ITEMS, ["8k"], None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"items": None}, "items must name a file"),
        ({"limit": 0}, "limit must be a whole number of at least 1; got 0"),
        ({"chunks": True}, "chunks must be a whole number"),
        ({"splits": "2k"}, "splits must be a list; got '2k'"),
        ({"sizes": [200, 100]}, "sizes must be numbers of tokens, ascending"),
        ({"sizes": ["64k"]}, "sizes must be numbers of tokens, ascending"),
        ({"memory": 3}, "memory must be a mapping; got 3"),
        ({"memory": {"topkk": 3}}, "Did you mean 'topk'?"),
        (
            {"retriever": "dense"},
            "retriever must be bm25, or module:Class of your own; got 'dense'",
        ),
        ({"retriever": "no.such:Thing"}, "retriever 'no.such:Thing' cannot be imported"),
        ({"retriever": "json:loads"}, "'json:loads' must be a class with best(question, count)"),
        ({"model": 5}, "model must be text; got 5"),
        ({"chat": "perhaps"}, "chat must be true, false or null; got 'perhaps'"),
        ({"seed": -1}, "seed must be a whole number of at least 0; got -1"),
        ({"memory": {"path": "x"}}, "memory.path cannot be set"),
        ({"conditions": [{"emt": None}]}, "conditions must be some of closed_book"),
        ({"conditions": 5}, "conditions must be some of closed_book"),
        ({"baseline": "rag", "conditions": ["closed_book"]}, "baseline must be one of"),
        ({"conditions": ["ragg"]}, "unknown condition 'ragg'"),
        ({"templates": {"chunks": ""}}, "templates are question and document; got 'chunks'"),
        ({"templates": {"question": "?"}}, "template 'question' must have {question}"),
    ],
)
def test_a_wrong_setting_is_refused(items, wrong, said):
    with pytest.raises(ConfigError) as caught:
        settings(**{"items": items, **wrong})
    assert said in str(caught.value)


def test_bad_items_stop_it_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "load", None)
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({**item().to_row(), "answer": "Rome"}))
    with pytest.raises(DocumentError, match="line 1: 'answer' 'Rome' is not in its context"):
        run_retrieval(settings(str(path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
