"""The relevance of a memory: when it is measured, and what its store keeps of it."""

import gc
import math
import weakref

import pytest

from emt import detach
from emt.errors import MemoryUseError
from emt.routing.head_search import HeadSearch
from emt.routing.relevance import Relevance
from emt.routing.relevance_store import RELEVANCE, RelevanceStore
from memory_backends import MemoryBackend
from tests.emt.routing.worlds import BACKENDS, asked, build, chosen, document, heads_of, routing
from tests.emt.words import word_tokenizer
from tests.families import let_go_of_models

KINDS = pytest.mark.parametrize("memory_type", BACKENDS)


def remembering(model, memory_type="manual", **settings):
    return routing(model, memory_type, tokenizer=word_tokenizer(), **settings)


@pytest.fixture
def measurements(monkeypatch):
    """Count how often a memory is measured; the result is always the same."""
    calls = []

    def measure_relevance(self, backend):
        calls.append(backend.num_searchable())
        return Relevance(calls[-1], -1.0, 0.0, 0.5)

    monkeypatch.setattr(HeadSearch, "measure_relevance", measure_relevance)
    return calls


def test_it_is_measured_once_and_again_when_the_memory_has_grown(measurements):
    memory = remembering(build("llama"))
    for _ in range(3):
        memory.route(asked(1))
    assert measurements == [237]
    memory.write(document(3), document="four")  # 97 rows: not half as many again
    memory.route(asked(1))
    assert measurements == [237]
    memory.write(document(4), document="five")
    memory.route(asked(1))
    assert measurements == [237, 440]


def test_it_is_measured_again_when_most_rows_are_others(measurements):
    memory = remembering(build("llama"))
    memory.route(asked(1))
    memory.write(document(4), document="two", replace=True)  # 106 rows in the place of 79
    memory.route(asked(1))
    assert measurements == [237]
    memory.write(document(0), document="one", replace=True)  # 70 more, and none by number
    memory.route(asked(1))
    assert measurements == [237, 264]
    memory.remove("two")
    memory.route(asked(1))
    assert measurements == [237, 264, 158]


def test_it_is_not_measured_where_it_does_not_matter(measurements):
    memory = remembering(build("llama"), relevance=None)
    memory.route(asked(1))
    with memory.using(relevance=0.5, routing="words"):
        memory.route(asked(1))
    assert measurements == []


def test_a_store_keeps_it_for_others(measurements, tmp_path):
    memory = remembering(build("llama"), path=str(tmp_path / "store"))
    memory.save()
    assert measurements == [237]
    kept = memory.backend.catalog.setting(RELEVANCE)
    assert kept["num_rows"] == 237
    heads = heads_of(memory)
    memory.close()
    backend = MemoryBackend.open(tmp_path / "store")
    relevance = RelevanceStore().of(heads, backend).to_json()
    assert relevance == {key: kept[key] for key in kept if key not in ("profile", "written")}
    assert measurements == [237]
    others = (
        {**kept, "profile": "other"},
        {**kept, "slope": None},
        {**kept, "deviation": 0.0},
        {**kept, "intercept": math.nan},
        {**kept, "num_rows": math.inf},
        {**kept, "written": 238},
        "words",
    )
    for other in others:
        backend.set_setting(RELEVANCE, other)
        RelevanceStore().of(heads, backend)
    assert measurements == [237] * (1 + len(others))
    backend.close()


@KINDS
def test_in_a_memory_of_a_few_rows_every_prompt_is_relevant(memory_type):
    memory = remembering(build("llama"), memory_type)
    memory.remove("two", "three")
    memory.write(document(1)[:57], document="two")
    routed = memory.route(asked(1))  # 127 rows
    assert routed.passages
    assert routed.relevance is None
    memory.write(document(2)[:1], document="three")
    assert heads_of(memory).measure_relevance(memory.backend) is not None


def test_a_model_in_training_mode_decides_nothing(tmp_path):
    model = build("llama")
    memory = remembering(model, path=str(tmp_path / "store"))
    model.train()
    assert memory.route(asked(1)).relevance is None
    with pytest.raises(MemoryUseError, match="the model is in training mode"):
        chosen(model, [asked(1)])
    memory.save()
    assert memory.backend.catalog.setting(RELEVANCE) is None
    model.eval()
    memory.save()
    assert memory.backend.catalog.setting(RELEVANCE)["num_rows"] == 237


@KINDS
def test_without_its_model_a_memory_is_saved_all_the_same(memory_type, tmp_path):
    model = build("llama")
    memory = remembering(model, memory_type, path=str(tmp_path / "store"))
    memory.route(asked(1))
    decoder = weakref.ref(model.model)
    detach(model)
    del model
    let_go_of_models()
    gc.collect()
    assert decoder() is None  # the router does not keep it alive
    memory.save()
    assert memory.backend.catalog.setting(RELEVANCE) is None
    memory.close()
    assert len(MemoryBackend.open(tmp_path / "store")) == 237


def test_a_memory_is_not_routed_while_it_is_written():
    memory = remembering(build("llama"))
    refused = pytest.raises(MemoryUseError, match=r"cannot route while .* busy with write\(\)")
    with memory.activity.alone("write"), refused:
        memory.route(asked(1))
