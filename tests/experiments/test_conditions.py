import pytest
from experiments.retrieval.conditions import STANDARD, answering, conditions_of
from experiments.retrieval.prompts import Templates
from experiments.retrieval.shelf import Shelf

from emt import MemoryConfig
from emt.errors import ConfigError
from tests.experiments.fakes import Parrot, item, tiny

TEMPLATES = Templates("Q: {question}", "{document} Q: {question}")
PUBLISHED = {"topk": 7}


def test_the_standard_conditions_by_name():
    found = conditions_of(list(STANDARD), PUBLISHED)
    assert [(one.name, one.kind) for one in found] == [
        ("closed_book", "closed_book"),
        ("document", "document"),
        ("emt_manual", "emt"),
        ("emt_vector_db", "emt"),
        ("passage", "passage"),
        ("rag", "rag"),
        ("rag_emt", "rag_emt"),
    ]
    assert [one.memory and one.memory.memory_type for one in found] == [
        None,
        None,
        "manual",
        "vector_db",
        "vector_db",
        None,
        "manual",
    ]
    published = MemoryConfig(memory_type="vector_db", mode="token", topk=7)
    assert found[3].memory == published
    assert found[4].memory == published.replace(mode="passage")
    assert [one.has_chunks for one in found] == [False] * 5 + [True] * 2


def test_a_condition_of_one_s_own_changes_the_memory():
    named = {"closed_book": None, "small": {"kind": "emt", "memory": {"topk": 4, "sinks": "one"}}}
    small = conditions_of(named, {"topk": 7, "stride": 64})[1]
    assert small.memory == MemoryConfig(mode="token", topk=4, sinks="one", stride=64)
    changed = conditions_of({"emt_vector_db": {"memory": {"index": "Flat"}}}, {})[0]
    assert changed.memory == MemoryConfig(memory_type="vector_db", mode="token", index="Flat")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["emt"], "unknown condition 'emt'. The conditions are closed_book, document, emt_manual"),
        ({"x": {"kind": "y"}}, "condition 'x' must have a kind of closed_book, document"),
        ({"x": {"kind": "emt", "topk": 3}}, "condition 'x' has kind and memory; got 'topk'"),
        ({"x": {"kind": "emt", "memory": {"topk": 0}}}, "condition 'x': topk must be"),
        ({"x": {"kind": "emt", "memory": {"enabled": False}}}, "condition 'x': enabled cannot be"),
        ({"rag": {"memory": {"topk": 3}}}, "'rag' of kind rag has no memory"),
        ({"x": 3}, "condition 'x' must be a mapping; got 3"),
        ([], "conditions must be some of"),
        ("closed_book", "conditions must be some of"),
    ],
)
def test_a_wrong_condition_is_refused_by_name(named, said):
    with pytest.raises(ConfigError) as caught:
        conditions_of(named, {})
    assert said in str(caught.value)


def ask(name, responder, shelf, one, memory=None):
    (condition,) = conditions_of([name], memory or {})
    with answering(condition, responder, shelf, templates=TEMPLATES, num_chunks=2) as answerer:
        return answerer.answer(one)


def test_a_text_model_answers_what_needs_no_memory(tmp_path):
    responder = Parrot(room=20, log_probs=(-1.0, -2.0))
    one = item(context=" ".join(f"word{at}" for at in range(30)) + " Leeds")
    shelf = Shelf([("a", one.context)], tmp_path, responder, chunk_tokens=3)
    answered = ask("closed_book", responder, shelf, one)
    assert responder.heard[-1] == ("Q: Where did the ship sail?", ["Leeds", "York"])
    assert answered.text == "Where did the ship sail?"
    assert (answered.num_prompt_tokens, answered.has_answer) == (8, None)
    assert answered.log_probs == (-1.0, -2.0)
    assert answered.seconds >= 0.5
    answered = ask("document", responder, shelf, one)
    assert (answered.truncated, answered.has_answer) == (True, False)
    ask("rag", responder, shelf, item(context=one.context, question="word4 or word13?"))
    assert responder.heard[-1][0].count("word") == 8  # two chunks and the question
    with pytest.raises(ConfigError, match="condition 'emt_manual' needs the model itself"):
        ask("emt_manual", responder, shelf, one)


def test_both_backends_read_one_store_and_say_the_same(tmp_path):
    responder = tiny(max_new_tokens=6)
    one = item()
    shelf = Shelf([("a", one.context)], tmp_path, responder, chunk_tokens=20)
    closed = ask("closed_book", responder, shelf, one)
    vector = ask("emt_vector_db", responder, shelf, one)
    manual = ask("emt_manual", responder, shelf, one)
    both = ask("rag_emt", responder, shelf, one)
    assert len(list(tmp_path.iterdir())) == 1
    assert vector.text == manual.text
    assert vector.log_probs == pytest.approx(manual.log_probs, abs=1e-4)
    assert vector.log_probs != pytest.approx(closed.log_probs, abs=1e-3)
    assert vector.num_prompt_tokens == closed.num_prompt_tokens < both.num_prompt_tokens
    assert ask("closed_book", responder, shelf, one).log_probs == closed.log_probs  # detached


def test_settings_that_change_rows_have_a_store_of_their_own(tmp_path):
    responder = tiny(max_new_tokens=2)
    shelf = Shelf([("a", item().context)], tmp_path, responder)
    for memory in ({"topk": 3}, {"topk": 5, "sinks": "one"}, {"stride": 16, "max_length": 32}):
        ask("emt_vector_db", responder, shelf, item(), memory)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_is_brought_up_to_date(tmp_path):
    responder = tiny(max_new_tokens=2)
    (condition,) = conditions_of(["emt_manual"], {})
    for names in (["a", "b"], ["b", "c"]):
        shelf = Shelf([(name, f"text of {name}") for name in names], tmp_path, responder)
        with shelf.remembered(responder.model, condition.memory, responder.tokenizer) as memory:
            assert [name for name in memory.documents if name in names] == names
            others = [name for name in memory.documents if name not in names]
            assert memory.scope == (memory.backend.catalog.scope(names) if others else None)
        assert shelf.seconds > 0
