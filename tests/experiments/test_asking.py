"""The conditions of the retrieval experiment, asked one by one."""

import pytest
from experiments.retrieval.asking import asking, scores
from experiments.retrieval.settings import STANDARD, RetrievalSettings
from experiments.retrieval.shelf import Shelf

from emt import MemoryConfig
from emt.errors import ConfigError
from tests.experiments.fakes import Parrot, item, tiny


def settings(conditions, **changes):
    templates = {"question": "Q: {question}", "document": "{document} Q: {question}"}
    names = list(conditions)
    return RetrievalSettings(
        **{"items": "x", "conditions": conditions, "baseline": names[0], "chunks": 2, **changes},
        templates=templates,
    )


def ask(name, responder, shelf, one, **changes):
    with asking(name, settings([name], **changes), responder, shelf) as answer:
        return answer(one)


def test_the_standard_conditions_by_name():
    made = settings(list(STANDARD), memory={"topk": 7})
    kinds = {name: condition.kind for name, condition in made.conditions.items()}
    assert list(kinds) == list(STANDARD)
    assert kinds["emt_manual"] == kinds["emt_vector_db"] == "emt"
    chunked = [name for name, condition in made.conditions.items() if condition.has_chunks]
    assert chunked == ["rag", "rag_emt"]
    published = MemoryConfig.published(memory_type="vector_db", mode="token", topk=7)
    assert made.config_of("emt_vector_db") == published
    assert made.config_of("rag_emt") == published.replace(memory_type="manual")
    assert made.config_of("rag") is None


def test_a_condition_of_one_s_own_changes_the_memory():
    named = {
        "closed_book": None,
        "small": {"kind": "emt", "memory": {"topk": 4, "sinks": "one"}},
        "emt_vector_db": {"kind": "emt", "memory": {"memory_type": "vector_db", "index": "Flat"}},
    }
    made = settings(named, memory={"topk": 7, "stride": 64})
    assert made.config_of("small") == MemoryConfig.published(
        mode="token", topk=4, sinks="one", stride=64
    )
    assert made.config_of("emt_vector_db").index == "Flat"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conditions": ["emt"]}, "conditions: unknown condition 'emt'. The conditions are closed"),
        ({"conditions": {"x": {"kind": "y"}}}, "conditions.x: kind: Input should be 'closed_book'"),
        ({"conditions": {"x": {"kind": "emt", "topk": 3}}}, "conditions.x: unknown setting 'topk'"),
        ({"conditions": {"x": {"kind": "emt", "memory": {"topk": 0}}}}, "topk must be"),
        ({"conditions": {"x": {"kind": "emt", "memory": {"enabled": False}}}}, "'enabled' cannot"),
        ({"conditions": {"rag": {"memory": {"topk": 3}}}}, "'rag' of kind rag has no memory"),
        ({"conditions": {"x": 3}}, "conditions.x: Input should be"),
        ({"conditions": []}, "conditions"),
        ({"conditions": 5}, "conditions: expected some of closed_book, document"),
        ({"baseline": "rag", "conditions": ["closed_book"]}, "baseline must be one of the"),
        ({"model": "endpoint:x", "conditions": ["rag", "emt_manual"]}, "conditions to [rag]"),
        ({"templates": {"question": "?"}}, "templates: question: expected a template with"),
        ({"splits": "2k"}, "splits: Input should be a valid list"),
        ({"items": None}, "items: Input should be a valid string; got None"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes, said):
    names = list(changes["conditions"]) if isinstance(changes.get("conditions"), list | dict) else 0
    baseline = {"baseline": names[0]} if names else {}
    with pytest.raises(ConfigError) as caught:
        RetrievalSettings(**{"items": "x", **baseline, **changes})
    assert said in str(caught.value)


def test_a_text_model_answers_what_needs_no_memory(tmp_path):
    responder = Parrot(room=20, log_probs=(-1.0, -2.0))
    one = item(context=" ".join(f"word{at}" for at in range(30)) + " Leeds")
    shelf = Shelf([("a", one.context)], tmp_path, responder, chunk_tokens=3)
    record = ask("closed_book", responder, shelf, one)
    assert responder.heard[-1] == ("Q: Where did the ship sail?", ["Leeds", "York"])
    assert record["text"] == "Where did the ship sail?"
    assert (record["num_prompt_tokens"], record["has_answer"]) == (8, None)
    assert (record["log_prob"], record["original_log_prob"]) == (-1.0, -2.0)
    assert record["seconds"] >= 0.5
    assert record["memory_seconds"] is None
    record = ask("document", responder, shelf, one)
    assert (record["truncated"], record["has_answer"]) == (True, False)
    ask("rag", responder, shelf, item(context=one.context, question="word4 or word13?"))
    assert responder.heard[-1][0].count("word") == 8  # two chunks and the question
    with pytest.raises(ConfigError, match="condition 'emt_manual' needs the model itself"):
        ask("emt_manual", responder, shelf, one)


def test_scores_tell_the_original_answer_apart_and_none_for_what_is_not_known():
    parrot = Parrot(words=4)
    response = parrot.respond("Not York but Leeds")
    unknown = scores(item(), response)
    assert (unknown["right"], unknown["original"]) == (True, True)
    assert (unknown["log_prob"], unknown["preferred"]) == (None, None)
    parrot.log_probs = (-2.0, -1.0)
    preferred = scores(item(), parrot.respond("York", ["Leeds", "York"]))
    assert (preferred["right"], preferred["original"]) == (False, True)
    assert (preferred["log_prob"], preferred["preferred"]) == (-2.0, False)
    lone = item(original_answer=None)
    record = scores(lone, parrot.respond("leeds", lone.candidates))
    assert (record["right"], record["log_prob"]) == (True, -2.0)
    assert (record["original"], record["original_log_prob"], record["preferred"]) == (None,) * 3


def test_both_backends_read_one_store_and_say_the_same(tmp_path):
    responder = tiny(max_new_tokens=6)
    one = item()
    shelf = Shelf([("a", one.context)], tmp_path, responder, chunk_tokens=20)
    names = ("closed_book", "emt_vector_db", "emt_manual", "rag_emt", "closed_book")
    closed, vector, manual, both, again = (ask(name, responder, shelf, one) for name in names)
    assert len(list(tmp_path.iterdir())) == 1
    assert vector["text"] == manual["text"]
    assert vector["log_prob"] == pytest.approx(manual["log_prob"], abs=1e-4)
    assert vector["log_prob"] != pytest.approx(closed["log_prob"], abs=1e-3)
    assert vector["num_prompt_tokens"] == closed["num_prompt_tokens"] < both["num_prompt_tokens"]
    assert again["log_prob"] == closed["log_prob"]  # detached


def test_settings_that_change_rows_have_a_store_of_their_own(tmp_path):
    responder = tiny(max_new_tokens=2)
    shelf = Shelf([("a", item().context)], tmp_path, responder)
    for memory in ({"topk": 3}, {"topk": 5, "sinks": "one"}, {"stride": 16, "max_length": 32}):
        ask("emt_vector_db", responder, shelf, item(), memory=memory)
    assert len(list(tmp_path.iterdir())) == 2
