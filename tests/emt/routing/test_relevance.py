"""What decides whether a prompt is about a memory: measured with prompts that are not."""

import json
import math

import numpy as np
import pytest

from emt.routing.known_relevance import RELEVANCE, KnownRelevance
from emt.routing.relevance import PROBES, Relevance, measured
from emt.routing.router import Router
from memory_backends import ManualBackend
from tests.emt.routing.worlds import asked, document, routing
from tests.emt.words import word_tokenizer
from tests.families import build


def test_the_line_is_that_of_least_squares():
    generator = np.random.default_rng(3)
    num_asking = generator.integers(4, 60, 24)
    noise = 0.2 * generator.standard_normal(24)
    shares = np.exp(-0.3 - 0.6 * np.log(num_asking) + noise)
    found = Relevance.fitted([*shares, 0.0], [*num_asking, 9], 5000)
    design = np.stack([np.ones(24), np.log(num_asking)], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.log(shares), rcond=None)
    rest = np.log(shares) - intercept - slope * np.log(num_asking)
    assert found.num_rows == 5000
    assert (found.intercept, found.slope) == pytest.approx((intercept, slope))
    assert found.deviation == pytest.approx(math.sqrt((rest**2).mean()))
    expected = (math.log(0.3) - intercept - slope * math.log(7)) / found.deviation
    assert found.of(0.3, 7) == pytest.approx(expected)
    assert found.of(0.0, 7) == -math.inf
    assert Relevance.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_prompts_of_one_length_and_one_share_give_no_slope():
    found = Relevance.fitted([0.25] * 8, [10] * 8, 1)
    assert (found.intercept, found.slope, found.deviation) == (math.log(0.25), 0, 0.05)


def test_too_few_that_find_anything_decide_nothing():
    assert Relevance.fitted([0.25] * 7 + [0.0] * 20, [10] * 27, 1) is None


def test_every_probe_is_asked_once_with_and_without_instructions():
    said = []
    found = measured(lambda prompt: (said.append(prompt), (0.5, len(prompt)))[1], 10)
    assert [prompt.split("\n")[0] for prompt in said] == list(PROBES)
    assert sum("\n" in prompt for prompt in said) == len(PROBES) / 2
    assert found.slope == pytest.approx(0, abs=1e-9)


def remembering(model, **settings):
    return routing(model, tokenizer=word_tokenizer(), **settings)


@pytest.fixture
def measurements(monkeypatch):
    """Count how often a memory is measured; the result is always the same."""
    calls = []

    def relevance(self, backend):
        calls.append(backend.num_searchable())
        return Relevance(calls[-1], -1.0, 0.0, 0.5)

    monkeypatch.setattr(Router, "relevance", relevance)
    return calls


def test_it_is_measured_once_and_again_when_the_memory_has_grown(measurements):
    model = build("llama")
    memory = remembering(model)
    for _ in range(3):
        memory.route(asked(1))
    assert measurements == [237]
    memory.write(document(3), document="four")  # 97 rows: not half as many again
    memory.route(asked(1))
    assert measurements == [237]
    memory.write(document(4), document="five")
    memory.route(asked(1))
    assert measurements == [237, 440]


def test_it_is_not_measured_where_nobody_asks(measurements):
    model = build("llama")
    memory = remembering(model, relevance=None)
    memory.route(asked(1))
    with memory.using(relevance=0.5, routing="words"):
        memory.route(asked(1))
    assert measurements == []


def test_a_store_keeps_it_for_others(measurements, tmp_path):
    model = build("llama")
    memory = remembering(model, path=str(tmp_path / "store"))
    memory.save()
    assert measurements == [237]
    kept = memory.backend.catalog.setting(RELEVANCE)
    assert kept["num_rows"] == 237
    memory.close()
    backend = ManualBackend.open(tmp_path / "store")
    found = KnownRelevance().of(memory.passages.finder.router(), backend)
    assert found.to_json() == {key: kept[key] for key in kept if key != "profile"}
    assert measurements == [237]
    for other in ({**kept, "profile": "other"}, {**kept, "slope": None}, "words"):
        backend.set_setting(RELEVANCE, other)
        KnownRelevance().of(memory.passages.finder.router(), backend)
    assert measurements == [237] * 4
    backend.close()


def test_probes_are_routed_as_prompts_are():
    model = build("llama")
    memory = remembering(model)
    router = memory.passages.finder.router()
    found = router.relevance(memory.backend)
    assert found.num_rows == 237
    assert -5 < found.intercept + found.slope * math.log(10) < 0  # the logarithm of a share
    assert found.deviation >= 0.05
