"""`emt search`: what `Memory.route` finds, with text and places; nothing is generated."""

import pytest

from emt.memory.memory import Memory
from emt.model.chat import prompt_ids
from emt.model.loading import load
from emt.passage import Passage, Question, Routed, RoutedPassage
from tests.emt.cli.test_generate import PROMPT, written_by_library
from tests.emt.commands import TEXTS, emt, emt_json, refused


@pytest.fixture
def routed(monkeypatch):
    """Let every query be about two passages; return what was asked, with which settings."""
    asked = []
    passages = (
        RoutedPassage(Passage("b.md", 2, 12), 0.75),
        RoutedPassage(Passage("a.txt", 0, 3), 0.125),
    )

    def route(memory, prompt):
        asked.append((prompt, memory.config, memory._using.scopes(memory.backend)))
        return Routed(Question(0, 0, 1), passages, 0.75, 2.5)

    monkeypatch.setattr(Memory, "route", route)
    return asked


def test_passages_have_their_places_and_text(store, routed):
    words = TEXTS["b.md"].split()
    found = emt_json("search", "--store", store, "w9 w33")
    text = TEXTS["b.md"]
    start = text.index("w37")
    end = text.index("w46") + 3
    assert found == {
        "query": "w9 w33",
        "passages": [
            {
                "document": "b.md",
                "start": start,
                "end": end,
                "first": 2,
                "stop": 12,
                "score": 0.75,
                "text": text[start:end],
            },
            {
                "document": "a.txt",
                "start": 0,
                "end": 8,
                "first": 0,
                "stop": 3,
                "score": 0.125,
                "text": "w5 w6 w7",
            },
        ],
        "relevance": 2.5,
    }
    assert emt("search", "--store", store, "w9 w33").out == (
        f"[1] score 0.75  b.md {start}-{end}, rows 2-12\n"
        f"      {' '.join(words[2:10])}\n      {' '.join(words[10:12])}\n"
        "[2] score 0.12  a.txt 0-8, rows 0-3\n      w5 w6 w7\n"
    )
    tokenizer = load(str(emt_json("info", store)["model"]["source"])).tokenizer
    assert routed[0][0] == prompt_ids(tokenizer, "w9 w33").tolist()


@pytest.mark.parametrize(
    ("options", "settings"), [("", {}), ("--max-passages 1", {"max_passages": 1})]
)
def test_the_passages_are_the_librarys(tmp_path, model, store, options, settings):
    _, memory = written_by_library(model, tmp_path, relevance=None, **settings)
    (tmp_path / "c.yaml").write_text("relevance: null\n")  # random models find nothing relevant
    expected = memory.route(PROMPT).passages
    config = ("--config", tmp_path / "c.yaml")
    found = emt_json("search", "--store", store, PROMPT, *config, *options.split())
    passages = found["passages"]
    assert [Passage(p["document"], p["first"], p["stop"]) for p in passages] == [
        each.passage for each in expected
    ]
    assert [p["score"] for p in passages] == pytest.approx([each.score for each in expected])
    assert len(passages) == settings.get("max_passages", 3)
    for passage in passages:
        assert TEXTS[passage["document"]][passage["start"] : passage["end"]] == passage["text"]


def test_options_are_settings(store, routed):
    emt("search", "--store", store, "w9", "--max-passages", 3, "--passage-rows", 99)
    _, config, scopes = routed.pop()
    assert (config.max_passages, config.passage_rows) == (3, 99)
    assert scopes is None
    emt("search", "w9", "--store", store, "--documents", "a.txt")
    assert routed.pop()[2] is not None
    refused("search", "w9", "--store", store, "--documents", "z", message="no document 'z'")
    refused("search", "w9", "--store", store, "--where", "year", message=".*must be KEY=VALUE")
    refused("search", "w9", "--store", store, "--max-passages", 0, message="max_passages .* got 0")


def test_a_query_about_nothing_says_so(store, monkeypatch):
    nothing = Routed(Question(0, 0, 1), (), 0.5, -1.0)
    monkeypatch.setattr(Memory, "route", lambda *_: nothing)
    said = emt("search", "--store", store, "w9").out
    assert said == f"Nothing in '{store}' is relevant to the query.\n"
    found = emt_json("search", "--store", store, "w9")
    assert found == {"query": "w9", "passages": [], "relevance": -1.0}


@pytest.mark.parametrize(
    ("query", "message"),
    [(" ", "the query is empty"), ("\udce9", "the query is not UTF-8")],
)
def test_no_query_is_refused(store, query, message):
    refused("search", "--store", store, query, message=message)


def test_a_query_behind_names_is_found_out(store):
    message = "there is no query, and no document 'w9 w33' in .* emt search \"QUERY\""
    refused("search", "--store", store, "--documents", "a.txt", "w9 w33", message=message)
