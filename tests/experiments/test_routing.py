"""The routing experiment: whether the passage that answers a question is found."""

import json

import pytest
from experiments.routing.report import draw, summary
from experiments.routing.run import run_routing
from experiments.routing.settings import RoutingSettings

from emt.attach import attach, detach
from emt.config import MemoryConfig
from emt.errors import ConfigError, DocumentError
from emt.model.loading import LoadedModel
from tests.emt.routing.worlds import profile_of, tokens
from tests.emt.words import word_tokenizer
from tests.families import build

TEXTS = {
    f"text {number}": " ".join(f"w{token}" for token in tokens(80, 30 + number).tolist())
    for number in (1, 2, 3)
}


@pytest.fixture
def world(tmp_path):
    """Return settings for a store of three texts, two questions about each, and its model."""
    model = build("llama")
    profile_of(model).write(tmp_path / "heads.json")
    store = tmp_path / "store"
    memory = attach(model, MemoryConfig.published(path=str(store)), tokenizer=word_tokenizer())
    memory.write_all(list(TEXTS.items()))
    detach(model)
    memory.close()
    rows = [
        {
            "context": text,
            "question": " ".join(text.split()[at - 3 : at + 4]),
            "answer": text.split()[at],
        }
        for text in TEXTS.values()
        for at in (20, 50)
    ]
    rows.append({"context": "w1 w2 w3 " * 30, "question": "w4", "answer": "w2"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "unrelated.txt").write_text("w5 w6 w7 w8\n\nw6 w5\nw6 w5\n")

    def settings(**changes):
        known = {
            "store": str(store),
            "data": str(tmp_path / "data.jsonl"),
            "profile": str(tmp_path / "heads.json"),
            "routing": ["heads"],
            "passage_rows": 24,
            "relevance": None,
        }
        return RoutingSettings(**{**known, **changes})

    return settings, LoadedModel(model, word_tokenizer(), "tiny"), tmp_path


def run(asked, loaded, folder):
    return run_routing(asked, folder, lambda: loaded)


def test_each_question_is_routed_as_the_passage_mode_does(world):
    settings, loaded, folder = world
    results = run(settings(), loaded, folder / "r")
    assert results.header["settings"]["questions"] == 6
    assert results.header["settings"]["left_out"] == 1
    assert len(results.items) == 6
    config = MemoryConfig.published(
        mode="passage",
        memory_type="vector_db",
        path=settings().store,
        profile=settings().profile,
        routing="heads",
        passage_rows=24,
        relevance=None,
    )
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    for one, (name, at) in zip(
        results.items.values(), [(name, at) for name in TEXTS for at in (20, 50)], strict=True
    ):
        question = " ".join(TEXTS[name].split()[at - 3 : at + 4])
        routed = memory.route(f"{question}\nAnswer in a few words.")
        passages = [found.passage for found in routed.passages]
        assert one["document"] == (passages[0].document == name)
        row = TEXTS[name].split().index(TEXTS[name].split()[at])  # where it stands first
        right = [p.document == name and p.first <= row < p.stop for p in passages]
        assert (one["first"], one["any"]) == (right[0], any(right))
        assert one["score"] == pytest.approx(routed.score, abs=1e-4)
        assert one["is_relevant"]
    memory.close()
    detach(loaded.model)
    again = run(settings(), loaded, folder / "r")
    assert again.items == results.items  # nothing is asked twice


def test_prompts_about_nothing_are_counted_apart(world):
    settings, loaded, folder = world
    given = {"unrelated": str(folder / "unrelated.txt")}
    results = run(settings(**given, relevance=1e6), loaded, folder / "none")
    told = [one for one in results.items.values() if one["any"] is None]
    assert len(told) == 2
    assert not any(one["is_relevant"] for one in results.items.values())
    text = summary(results.header, results.items)
    assert "2 prompts about nothing in the store" in text
    assert "| 240 | heads | 100 [100, 100] |" in text
    every = run(settings(**given), loaded, folder / "all")
    assert "| 240 | heads | 0 [0, 0] |" in summary(every.header, every.items)
    right = sum(one["any"] or 0 for one in every.items.values())
    assert f" {100 * right / 6:.0f} [" in summary(every.header, every.items)
    assert [path.name for path in draw(every.header, every.items, folder)] == ["routing.png"]


def test_smaller_memories_have_what_is_asked_about(world):
    settings, loaded, folder = world
    results = run(settings(sizes=[240]), loaded, folder / "r")
    assert {one["rows"] for one in results.items.values()} == {240}
    with pytest.raises(ConfigError, match="a memory of 100 rows is too small for the documents"):
        run(settings(sizes=[100]), loaded, folder / "small")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"store": "nowhere"}, "there is no store 'nowhere'"),
        ({"unrelated": "nowhere.txt"}, "unrelated prompts 'nowhere.txt' cannot be read"),
        ({"wording": "nowhere.jsonl"}, "'nowhere.jsonl' cannot be read"),
    ],
)
def test_what_is_not_there_is_named(world, wrong, message):
    settings, loaded, folder = world
    with pytest.raises((ConfigError, DocumentError), match=message):
        run(settings(**wrong), loaded, folder / "r")


def test_questions_about_nothing_in_the_store_are_an_error(world):
    settings, loaded, folder = world
    (folder / "other.jsonl").write_text(
        json.dumps({"context": "w1 w2 w3 " * 30, "question": "w4", "answer": "w2"})
    )
    with pytest.raises(ConfigError, match=r"no question of .* is about a document of"):
        run(settings(data=str(folder / "other.jsonl")), loaded, folder)
