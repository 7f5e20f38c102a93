"""Retrievers of LangChain and LlamaIndex find what `Memory.route` finds, here and over HTTP."""

import pytest

from emt import detach
from emt.errors import ConfigError, DocumentError
from emt.integrations.search import MemorySearch, SearchError, ServerSearch
from emt.serving.app import create_app
from tests.emt.serving.tiny_server import TEXTS, make_memory, serving

QUERY = "w31 w32 w33"
SETTINGS = {"documents": ["b", "c"], "max_passages": 2, "passage_rows": 12}


@pytest.fixture(scope="module")
def world():
    """Yield a memory, and the address of a server of it."""
    model, memory = make_memory()
    with serving(create_app(model, memory, model_name="tiny")) as url:
        yield memory, url
    detach(model)


@pytest.fixture(params=["memory", "server"])
def search(world, request):
    memory, url = world
    if request.param == "memory":
        return MemorySearch(memory, **SETTINGS)
    return ServerSearch(url, **SETTINGS)


def expected(memory):
    """Return document, first and last character, and score of what is to be found."""
    ids = memory.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUERY}], add_generation_prompt=True, return_dict=False
    )
    with memory.using(**SETTINGS):
        routed = memory.route(ids)
    found = []
    for each in routed.passages:
        document = memory.backend.catalog.document(each.passage.document)
        tokens = document.row_tokens[each.passage.first : each.passage.stop]
        start, end = int(document.offsets[tokens[0]][0]), int(document.offsets[tokens[-1]][1])
        found.append((document.name, start, end, pytest.approx(each.score)))
    assert found
    return found


def test_langchain(world, search):
    langchain = pytest.importorskip("emt.integrations.langchain", exc_type=ImportError)
    documents = langchain.EMTRetriever(search=search).invoke(QUERY)
    keys = ("source", "start", "end", "score")
    assert [tuple(each.metadata[key] for key in keys) for each in documents] == expected(world[0])
    for each in documents:
        about = each.metadata
        assert each.page_content == TEXTS[about["source"]][about["start"] : about["end"]]


def test_llamaindex(world, search):
    llamaindex = pytest.importorskip("emt.integrations.llamaindex", exc_type=ImportError)
    nodes = llamaindex.EMTRetriever(search).retrieve(QUERY)
    places = [
        (each.node.metadata["source"], each.node.start_char_idx, each.node.end_char_idx, each.score)
        for each in nodes
    ]
    assert places == expected(world[0])
    for each, (name, start, end, _) in zip(nodes, places, strict=True):
        assert each.node.get_content() == TEXTS[name][start:end]
        assert each.node.node_id == f"{name}:{start}-{end}"


def test_mistakes_are_named(world):
    memory, url = world
    with pytest.raises(DocumentError, match="nowhere"):
        MemorySearch(memory, documents=["nowhere"])(QUERY)
    with pytest.raises(SearchError, match=r"404.*nowhere"):
        ServerSearch(url, documents=["nowhere"])(QUERY)
    with pytest.raises(SearchError, match="400"):
        ServerSearch(f"{url}/v1/")("  ")
    with pytest.raises(SearchError, match="cannot be reached"):
        ServerSearch("http://127.0.0.1:9", timeout=2)(QUERY)
    with pytest.raises(ConfigError, match="http"):
        ServerSearch("localhost:8000")
