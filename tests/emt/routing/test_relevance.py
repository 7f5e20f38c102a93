"""What decides whether a prompt is about a memory: a line fitted to probes, which are not."""

import itertools
import json
import math
from dataclasses import replace

import torch
import numpy as np
import pytest
from tokenizers import Regex, normalizers

from emt.model.chat import prompt_ids
from emt.routing.evidence import best_windows
from emt.routing.probes import PROBES
from emt.routing.relevance import Relevance, expected_maximum, measure_relevance, token_runs
from tests.emt.routing.worlds import asked, build, heads_of, router_of, routing, tokens
from tests.emt.words import word_tokenizer


@pytest.fixture(scope="module")
def world():
    """A model, and its memory that no test changes."""
    model = build("llama")
    return model, routing(model, tokenizer=word_tokenizer())


def test_the_line_is_that_of_least_squares():
    generator = np.random.default_rng(3)
    num_tokens = generator.integers(4, 60, 24)
    noise = 0.2 * generator.standard_normal(24)
    scores = np.exp(-0.3 - 0.6 * np.log(num_tokens) + noise)
    relevance = Relevance.fit([*scores, 0.0], [*num_tokens, 9], 5000)
    design = np.stack([np.ones(24), np.log(num_tokens)], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.log(scores), rcond=None)
    rest = np.log(scores) - intercept - slope * np.log(num_tokens)
    assert relevance.num_rows == 5000
    assert (relevance.intercept, relevance.slope) == pytest.approx((intercept, slope))
    assert relevance.deviation == pytest.approx(math.sqrt((rest**2).mean()))
    expected = (math.log(0.3) - intercept - slope * math.log(7)) / relevance.deviation
    assert relevance.of(0.3, 7) == pytest.approx(expected)
    assert relevance.of(0.0, 7) == -math.inf
    assert Relevance.from_json(json.loads(json.dumps(relevance.to_json()))) == relevance


def test_probes_of_one_length_and_one_score_give_no_slope():
    assert Relevance.fit([0.25] * 8, [10] * 8, 1) == Relevance(1, math.log(0.25), 0.0, 0.05)


def test_too_few_probes_with_evidence_decide_nothing():
    assert Relevance.fit([0.25] * 7 + [0.0] * 20, [10] * 27, 1) is None


def test_every_probe_is_routed_once_with_and_without_instructions():
    routed = []
    relevance = measure_relevance(lambda prompt: (routed.append(prompt), (0.5, len(prompt)))[1], 10)
    assert [prompt.split("\n")[0] for prompt in routed] == list(PROBES)
    assert sum("\n" in prompt for prompt in routed) == len(PROBES) / 2
    assert relevance.slope == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num_tokens", [1, 24, 25, 40, 63])
def test_a_long_prompt_is_judged_by_runs_that_overlap_by_half(num_tokens):
    runs = token_runs(num_tokens)
    assert sorted({token for run in runs for token in run}) == list(range(num_tokens))
    if num_tokens <= 24:
        assert runs == [range(num_tokens)]
        return
    assert all(8 < len(run) <= 16 for run in runs)
    assert all(run.start + 8 == following.start for run, following in itertools.pairwise(runs))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 30])
def test_the_expected_maximum_is_that_of_normal_numbers(count):
    rng = np.random.default_rng(count)
    expected = rng.standard_normal((100_000, count)).max(axis=1).mean()
    assert expected_maximum(count) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("question_first", [True, False])
def test_a_question_among_other_words_counts(world, question_first):
    _, memory = world
    router = router_of(memory)
    parts = [asked(1, length=16), tokens(40, 77)]
    prompt = torch.cat(parts if question_first else parts[::-1])
    line = Relevance(237, -1.0, -0.3, 0.5)
    routed = router.route(prompt, memory.backend, memory.config, relevance=line)
    hits = heads_of(memory).hits(prompt, range(len(prompt)), memory.backend)
    deviations = []
    for run in token_runs(len(prompt)):
        kept = np.isin(hits.queries % len(prompt), run)
        part = replace(
            hits,
            rows=hits.rows[kept],
            queries=hits.queries[kept],
            excess=hits.excess[kept],
            documents=hits.documents[kept],
        )
        (best,) = best_windows(part, 1, min_distance=1)
        deviations.append(line.of(best.score, len(run)))
    expected = max(deviations) - expected_maximum(len(deviations))
    assert routed.relevance == pytest.approx(expected)


def test_it_is_measured_in_the_whole_memory_whatever_is_read_now(world):
    _, memory = world
    with memory.using(documents=["one"]):
        scoped = memory.route(asked(0))
    relevance = heads_of(memory).measure_relevance(memory.backend)
    num_tokens = scoped.question.stop - scoped.question.first
    assert scoped.relevance == pytest.approx(relevance.of(scoped.score, num_tokens))
    assert relevance.num_rows == 237
    assert -5 < relevance.intercept + relevance.slope * math.log(10) < 0  # a score's logarithm
    assert relevance.deviation >= 0.05


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ '' }}"])
def test_a_template_that_does_not_take_a_prompt_leaves_it_plain(world, template):
    _, plain = world
    model, tokenizer = build("llama"), word_tokenizer()
    tokenizer.chat_template = template
    assert prompt_ids(tokenizer, "w5 w6").tolist() == word_tokenizer()("w5 w6")["input_ids"]
    memory = routing(model, tokenizer=tokenizer)
    measured = heads_of(memory).measure_relevance(memory.backend)
    assert measured == heads_of(plain).measure_relevance(plain.backend)


def test_probes_without_tokens_decide_nothing():
    model, tokenizer = build("llama"), word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    memory = routing(model, tokenizer=tokenizer)
    assert heads_of(memory).measure_relevance(memory.backend) is None
    assert memory.route(asked(1)).passages
