"""What decides whether a prompt is about a memory: measured with prompts that are not."""

import gc
import itertools
import json
import math
import weakref

import torch
import numpy as np
import pytest
from tokenizers import Regex, normalizers

from emt import detach
from emt.errors import MemoryUseError
from emt.model.chat import prompt_ids
from emt.routing.evidence import Hits, windows_of
from emt.routing.known_relevance import RELEVANCE, KnownRelevance
from emt.routing.relevance import PROBES, Relevance, best_by_chance, measured, runs_of
from emt.routing.router import Router
from memory_backends import ManualBackend
from tests.emt.routing.worlds import asked, chosen, document, routing, tokens
from tests.emt.words import word_tokenizer
from tests.families import build, let_go_of_models


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


@pytest.mark.parametrize("num_asking", [1, 24, 25, 40, 63])
def test_a_long_prompt_is_judged_by_runs_that_overlap_by_half(num_asking):
    runs = runs_of(num_asking)
    assert sorted({token for run in runs for token in run}) == list(range(num_asking))
    if num_asking <= 24:
        assert runs == [range(num_asking)]
        return
    assert all(8 < len(run) <= 16 for run in runs)
    assert all(one.start + 8 == two.start for one, two in itertools.pairwise(runs))


def test_what_is_asked_among_other_words_counts():
    model = build("llama")
    memory = remembering(model, relevance=None)
    router = memory.passages.finder.router()
    bare, chatter = asked(1, length=16), tokens(40, 77)
    line = Relevance(237, -1.0, -0.3, 0.5)
    options = {"num_rows": 24, "num_passages": 2, "relevance": line, "least": -math.inf}
    for prompt in (torch.cat([chatter, bare]), torch.cat([bare, chatter])):
        found = router.route(prompt, memory.backend, **options)
        hits = router.hits(prompt, range(len(prompt)), memory.backend)
        shares = []
        for run in runs_of(len(prompt)):
            mine = [place for place, token in enumerate(hits.askers % len(prompt)) if token in run]
            part = Hits(hits.rows[mine], hits.askers[mine], hits.excess[mine], hits.num_askers)
            shares.append(line.of(windows_of(part, 1, apart=1)[0].share, len(run)))
        by_chance = best_by_chance(len(shares))
        assert found.relevance == pytest.approx(max(shares) - by_chance)


def test_too_few_that_find_anything_decide_nothing():
    assert Relevance.fitted([0.25] * 7 + [0.0] * 20, [10] * 27, 1) is None


def test_every_probe_is_asked_once_with_and_without_instructions():
    said = []
    found = measured(lambda prompt: (said.append(prompt), (0.5, len(prompt)))[1], 10)
    assert [prompt.split("\n")[0] for prompt in said] == list(PROBES)
    assert sum("\n" in prompt for prompt in said) == len(PROBES) / 2
    assert found.slope == pytest.approx(0, abs=1e-9)


def remembering(model, memory_type="manual", **settings):
    return routing(model, memory_type, tokenizer=word_tokenizer(), **settings)


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
    assert found.to_json() == {key: kept[key] for key in kept if key not in ("profile", "written")}
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
        KnownRelevance().of(memory.passages.finder.router(), backend)
    assert measurements == [237] * (1 + len(others))
    backend.close()


def test_it_is_measured_again_when_most_rows_are_others(measurements):
    model = build("llama")
    memory = remembering(model)
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


def test_it_is_measured_in_the_whole_memory_whatever_is_read_now():
    model = build("llama")
    memory = remembering(model)
    finder = memory.passages.finder
    with memory.using(documents=["one"]):
        scoped = memory.route(asked(0))
    expected = finder.router().relevance(memory.backend)
    num_asking = scoped.question.stop - scoped.question.first
    assert scoped.relevance == pytest.approx(expected.of(scoped.score, num_asking))


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_in_a_memory_of_a_few_rows_every_prompt_is_relevant(memory_type):
    model = build("llama")
    memory = remembering(model, memory_type)
    memory.remove("two", "three")
    memory.write(document(1)[:57], document="two")
    routed = memory.route(asked(1))  # 127 rows
    assert routed.passages
    assert routed.relevance is None
    memory.write(document(2)[:1], document="three")
    assert memory.passages.finder.router().relevance(memory.backend) is not None


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


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_without_its_model_a_memory_is_saved_all_the_same(memory_type, tmp_path):
    model = build("llama")
    memory = remembering(model, memory_type, path=str(tmp_path / "store"))
    memory.route(asked(1))
    decoder = weakref.ref(model.model)
    detach(model)
    del model
    let_go_of_models()
    gc.collect()
    assert decoder() is None  # what routed does not keep it
    memory.save()
    assert memory.backend.catalog.setting(RELEVANCE) is None
    memory.close()
    assert len(ManualBackend.open(tmp_path / "store")) == 237


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ '' }}"])
def test_a_template_that_does_not_take_a_prompt_leaves_it_plain(template):
    model = build("llama")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    memory = routing(model, tokenizer=tokenizer)
    plain = word_tokenizer()
    assert prompt_ids(tokenizer, "w5 w6").tolist() == plain("w5 w6")["input_ids"]
    same_model = build("llama")
    other = routing(same_model, tokenizer=plain)
    found = [one.passages.finder.router().relevance(one.backend) for one in (memory, other)]
    assert found[0] == found[1]


def test_probes_without_tokens_find_nothing():
    model = build("llama")
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    memory = routing(model, tokenizer=tokenizer)
    assert memory.passages.finder.router().relevance(memory.backend) is None
    assert memory.route(asked(1)).passages


def test_a_memory_is_not_routed_while_it_is_written():
    model = build("llama")
    memory = remembering(model)
    refused = pytest.raises(MemoryUseError, match=r"cannot route while .* busy with write\(\)")
    with memory.activity.alone("write"), refused:
        memory.route(asked(1))


def test_probes_are_routed_as_prompts_are():
    model = build("llama")
    memory = remembering(model)
    router = memory.passages.finder.router()
    found = router.relevance(memory.backend)
    assert found.num_rows == 237
    assert -5 < found.intercept + found.slope * math.log(10) < 0  # the logarithm of a share
    assert found.deviation >= 0.05


@pytest.mark.parametrize("count", [1, 2, 3, 8, 30])
def test_the_best_of_several_is_what_normal_numbers_give(count):
    rng = np.random.default_rng(count)
    expected = rng.standard_normal((100_000, count)).max(axis=1).mean()
    assert best_by_chance(count) == pytest.approx(expected, abs=0.03)
