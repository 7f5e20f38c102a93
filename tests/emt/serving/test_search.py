"""The route of search: what `Memory.route` finds, and nothing else."""

import pytest

from tests.emt.serving.site import open_site

TEXTS = {
    "a": " ".join(f"w{number}" for number in range(3, 40)),
    "b": " ".join(f"w{number}" for number in range(30, 70)),
    "c": " ".join(f"w{3 + number % 94}" for number in range(200)),
}


@pytest.fixture(scope="module", params=["vector_db", "sharded"])
def site(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("search")
    with open_site(folder, relevance=None, memory_type=request.param) as site:
        for number, (name, text) in enumerate(TEXTS.items()):
            site.put("root", name, text, number=number)
        yield site


def ask(site, **body):
    return site("root", "POST", "/v1/search", json=body)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"documents": ["a", "c"]},
        {"where": {"number": [0, 1]}},
        {"documents": ["a", "c"], "where": {"number": 2}},
        {"max_passages": 1},
        {"max_passages": 2, "passage_rows": 16},
        {"documents": []},
    ],
)
def test_passages_are_those_of_the_memory(site, settings):
    query = "w31 w32 w33"
    found = ask(site, query=query, **settings).json()
    with site.memory.using(**settings):
        routed = site.memory.route(site.memory.tokenizer(query)["input_ids"])
    expected = []
    for each in routed.passages:
        document = site.memory.backend.catalog.document(each.passage.document)
        tokens = document.row_tokens[each.passage.first : each.passage.stop]
        start, end = int(document.offsets[tokens[0]][0]), int(document.offsets[tokens[-1]][1])
        expected.append(
            {
                "document": document.name,
                "start": start,
                "end": end,
                "text": TEXTS[document.name][start:end],
                "score": each.score,
            }
        )
    assert found["data"] == expected
    assert found["relevance"] == pytest.approx(routed.relevance, abs=1e-5)
    assert bool(expected) == (settings.get("documents") != [])


def test_no_more_passages_are_found_than_rows_are_asked_for(site):
    for settings in ({"passage_rows": 1}, {"passage_rows": 2, "max_passages": 5}):
        found = ask(site, query="w31 w32", **settings)
        assert found.status_code == 200, found.text
        assert 0 < len(found.json()["data"]) <= settings["passage_rows"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "query"),
        ({"query": ""}, 400, "query"),
        ({"query": " \n"}, 400, "query"),
        ({"query": "w3", "documents": "a"}, 400, "documents"),
        ({"query": "w3", "documents": ["a", "d"]}, 404, "documents"),
        ({"query": "w3", "where": {"number": None}}, 400, None),
        ({"query": "w3", "where": ["number"]}, 400, "where"),
        ({"query": "w3", "max_passages": 0}, 400, "max_passages"),
        ({"query": "w3", "passage_rows": 10**9}, 400, "passage_rows"),
        ({"query": "w3", "passages": 1}, 400, "passages"),
    ],
)
def test_what_is_wrong_is_named(site, body, status, param):
    response = ask(site, **body)
    assert response.status_code == status
    assert param is None or response.json()["error"]["param"] == param


def test_half_a_surrogate_pair(site):
    for body in ('{"query": "\\ud800"}', '{"query": "w3", "documents": ["\\ud800"]}'):
        response = site("root", "POST", "/v1/search", content=body)
        assert response.status_code in (400, 404)


def test_a_store_without_rows_is_written_and_searched(tmp_path):
    with open_site(tmp_path, relevance=None, row_codec="text") as site:
        for name, text in TEXTS.items():
            site.put("root", name, text)
        found = ask(site, query="w31 w32 w33").json()["data"]
        assert not site.memory.backend.keeps_rows
        assert site.memory.backend.catalog.fine_heads
        assert found[0]["document"] in ("a", "b", "c")
        assert all(each["text"] in TEXTS[each["document"]] for each in found)
