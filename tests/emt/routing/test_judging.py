"""What the question's likelihood decides: the order of passages, and whether there are any."""

import itertools
import math
import threading

import torch
import pytest

from emt import attach
from emt.modes.passage.likelihood import QuestionLikelihood
from emt.routing.evidence import Window
from emt.routing.fusion import Place
from emt.routing.judging import judged
from memory_backends import MemoryBackend
from tests.emt.routing.worlds import (
    NAMES,
    asked,
    attached_model,
    build,
    chosen,
    document,
    left_padded,
    put,
    router_of,
    routing,
    tokens,
)
from tests.emt.words import word_tokenizer


@pytest.fixture(scope="module")
def world():
    """A model, and its memory that no test changes."""
    model = build("llama")
    return model, routing(model)


def places_of(memory, peaks, priors=(1.5, 0.8, 0.5, 0.2, 0.1)):
    """Return places, best first, at rows of the documents in turn."""
    firsts = [memory.backend.catalog.document(name).first_row for name in NAMES]
    return [
        Place(Window(firsts[number % 3] + row, 0.5 / (1 + number), firsts[number % 3]), prior)
        for number, (row, prior) in enumerate(zip(peaks, priors, strict=False))
    ]


def by_hand(log_probs, priors):
    """Return the order of n places, how many are not far behind, and the largest gain.

    A place's weight is how many times likelier it makes the question, times its prior squared.
    """
    *after, none = log_probs
    gains = [[one - other for one, other in zip(row, none, strict=True)] for row in after]
    weights = [math.exp(sum(row)) * prior**2 for row, prior in zip(gains, priors, strict=True)]
    return (
        sorted(range(len(weights)), key=lambda i: -weights[i]),
        sum(weight >= max(weights) * math.exp(-8) for weight in weights),
        max(sum(sorted(row)[-3:]) / 3 for row in gains),
    )


# -- the order and the gain -------------------------------------------------------------------


def answers(log_probs):
    """Return a judge of places that are asked about in turn, and what it was given, by call."""
    calls = []

    def ask_back(passages):
        first = sum(map(len, calls))
        calls.append(passages)
        return torch.cat([log_probs[first : first + len(passages)], log_probs[-1:]])

    return ask_back, calls


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 9])
def test_order_and_gain_are_those_by_hand(world, num_tokens):
    _, memory = world
    places = places_of(memory, [5, 30, 60, 40, 10])
    for seed in range(5):
        log_probs = -torch.rand(6, num_tokens, generator=torch.Generator().manual_seed(seed)) * 4
        ask_back, calls = answers(log_probs)
        windows, num_likely, gain = judged(places, ask_back, memory.backend, 12)
        order, num_expected, expected = by_hand(
            log_probs.tolist(), [place.prior for place in places]
        )
        assert windows == [places[i].window for i in order]
        assert num_likely == num_expected
        assert gain == pytest.approx(expected, abs=1e-5)
        for passage, place in zip(itertools.chain(*calls), places, strict=True):
            window = place.window
            first = memory.backend.catalog.document(passage.document).first_row
            assert first == window.document
            assert first + passage.first <= window.peak < first + passage.stop
            assert passage.stop - passage.first <= 12


@pytest.mark.parametrize(("gain", "num_judged"), [(3.9, [4, 1]), (4.1, [4])])
def test_four_places_are_judged_alone_where_they_leave_no_doubt(world, gain, num_judged):
    _, memory = world
    places = places_of(memory, [5, 30, 60, 40, 10])
    log_probs = torch.full((6, 3), -9.0)
    log_probs[2] += gain
    log_probs[4] += 9
    ask_back, calls = answers(log_probs)
    found, _, most = judged(places, ask_back, memory.backend, 12)
    assert list(map(len, calls)) == num_judged
    assert found[0] == places[2 if len(num_judged) == 1 else 4].window
    assert most == pytest.approx(gain if len(num_judged) == 1 else 9)


def test_without_a_token_to_judge_the_order_stays(world):
    _, memory = world
    places = places_of(memory, [5, 30])
    found = judged(places, lambda passages: torch.zeros(3, 0), memory.backend, 12)
    assert found == ([place.window for place in places], 2, None)


def test_what_was_removed_meanwhile_is_not_judged():
    memory = routing(build("llama"))
    places = places_of(memory, [5, 30, 60])
    memory.remove("two")
    given = []

    def ask_back(passages):
        given.extend(passages)
        return torch.zeros(3, 4)

    left = [places[0].window, places[2].window]
    assert judged(places, ask_back, memory.backend, 12) == (left, 2, 0.0)
    assert [passage.document for passage in given] == ["one", "three"]
    memory.clear()
    assert judged(places, ask_back, memory.backend, 12) == ([], 0, None)


# -- routing with a judge ---------------------------------------------------------------------


def test_as_many_places_are_judged_as_the_setting_says(world):
    _, memory = world
    calls = []

    def judge(asking, passages, backend, *, beside=None):
        calls.append((asking.at, asking.tokens, len(passages)))
        return torch.zeros(len(passages) + 1, len(asking.tokens) - 1)

    def route(**settings):
        config = memory.config.replace(**settings)
        return router_of(memory).route(asked(1), memory.backend, config, judge=judge)

    plain = router_of(memory).route(asked(1), memory.backend, memory.config)
    assert plain.relevance is None
    for count in (1, 2, 3):
        routed = route(candidates=count)
        assert 0 < len(routed.passages) <= count  # what was not judged is left out
        assert routed.relevance == 0.0
        assert calls[0] == (0, list(range(len(asked(1)))), count)
        calls.clear()
    assert route(candidates=3, relevance=0.1).passages == ()
    assert route(candidates=3, relevance=-0.1).passages == routed.passages
    with memory.using(candidates=0, relevance=1e6):
        assert memory.route(asked(1)) == plain


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_tokens_without_a_likelihood_gain_nothing(world, value):
    _, memory = world
    places = places_of(memory, [5, 30])
    log_probs = torch.tensor([[-4.0, value, -3.0, -1.0], [-1.0, value, -4.0, -1.0], [-2.0] * 4])
    for none in (value, -2.0):
        log_probs[-1, 1] = none
        found, _, gain = judged(places, lambda passages: log_probs, memory.backend, 12)
        assert found == [places[1].window, places[0].window]  # they gain 0 and -2 nats
        assert gain == pytest.approx(2 / 3)  # of 1, 1, 0 and -2


def test_documents_whose_rows_are_gone_are_not_followed():
    memory = routing(build("llama"), tokenizer=word_tokenizer())
    memory.write("w3 w4 w5 w6 w60 w7 w8", document="first")
    memory.write("w3 w4 w20 w21", document="w60")
    first_row = memory.backend.catalog.document("w60").first_row
    prompt = memory.tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"][0]
    with memory.using(documents=["first", "w60"]):
        memory.backend.remove(range(first_row, first_row + 5))
        assert [each.passage.document for each in memory.route(prompt).passages] == ["first"]


def test_a_memory_is_routed_with_the_models_likelihood(world):
    _, memory = world
    likelihood = QuestionLikelihood(attached_model(memory))
    expected = router_of(memory).route(asked(1), memory.backend, memory.config, judge=likelihood)
    assert memory.route(asked(1)) == expected
    assert math.isfinite(expected.relevance)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mpt", "gemma3_text"])
def test_below_the_threshold_it_is_the_plain_model(model_type):
    model = build(model_type)
    heads = {"gemma3_text": ((1, 1), (1, 3))}.get(model_type, ((0, 1), (2, 3)))
    prompt = asked(1)
    plain = model(prompt[None]).logits
    answer = chosen(model, [prompt])
    memory = routing(model, heads=heads)
    gain = memory.route(prompt).relevance
    with memory.using(relevance=gain + 1e-3), memory.recording() as recording:
        routed = memory.route(prompt)
        assert (routed.passages, routed.relevance) == ((), gain)
        assert torch.equal(model(prompt[None]).logits, plain)
        assert chosen(model, [prompt]) == answer
    assert all(not each.passages for each in recording.routed)
    with memory.using(relevance=gain - 1e-3):
        assert memory.route(prompt).passages
        assert not torch.allclose(model(prompt[None]).logits, plain, atol=1e-3)


@torch.no_grad()
def test_each_prompt_of_a_padded_batch_is_judged_as_alone(world):
    model, memory = world
    prompts = [asked(2, length=12), asked(0, length=5), tokens(4, 9)]
    ids, mask = left_padded(prompts)
    with memory.recording() as recording:
        model(ids, attention_mask=mask)
    assert recording.routed == [memory.route(prompt) for prompt in prompts]


def test_only_rows_in_scope_are_judged(world, monkeypatch):
    _, memory = world
    seen = []
    own = QuestionLikelihood.__call__

    def judge(self, asking, passages, backend, *, beside=None):
        seen.extend(passage.document for passage in passages)
        return own(self, asking, passages, backend, beside=beside)

    monkeypatch.setattr(QuestionLikelihood, "__call__", judge)
    with memory.using(documents=["three"]):
        memory.route(asked(1))
    assert set(seen) == {"three"}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_prompts_of_a_few_tokens(world, length):
    model, memory = world
    prompt = document(1)[20 : 20 + length]
    routed = memory.route(prompt)
    assert routed.passages
    assert (routed.relevance is None) == (length == 1)
    with memory.using(relevance=1e6):  # one token chose nothing that could tell
        assert bool(memory.route(prompt).passages) == (length == 1)
    assert chosen(model, [prompt])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_long_prompt_is_routed_as_far_as_the_model_has_positions(model_type):
    options = {"gpt2": {"n_positions": 160}}.get(model_type, {"max_position_embeddings": 160})
    model = build(model_type, **options)
    memory = routing(model)
    for length in (100, 110, 120, 126, 128, 130, 140, 155, 158, 159, 160):
        for rows in (1, 3, 16, 24):
            with memory.using(passage_rows=rows, max_passages=1):
                routed = memory.route(tokens(length, 7))
        assert bool(routed.passages) == (routed.relevance is not None)


def test_a_thousand_tokens_are_judged_by_the_last_64(world):
    _, memory = world
    prompt = torch.cat([tokens(1000, 8), asked(1)])
    routed = memory.route(prompt)
    end = router_of(memory).route(
        prompt, memory.backend, memory.config, judge=QuestionLikelihood(attached_model(memory))
    )
    assert routed == end
    seen = []

    def judge(asking, passages, backend, *, beside=None):
        seen.append(asking)
        return torch.zeros(len(passages) + 1, len(asking.tokens) - 1)

    router_of(memory).route(prompt, memory.backend, memory.config, judge=judge)
    token_ids, at, asking = seen[0]
    assert all(each is seen[0] for each in seen)
    assert torch.equal(token_ids, prompt[-64:])
    assert (at, asking) == (0, list(range(64)))


def test_in_training_mode_nothing_is_judged():
    model = build("llama")
    memory = routing(model)
    expected = router_of(memory).route(asked(1), memory.backend, memory.config)
    model.train()
    assert memory.route(asked(1)) == expected


def test_a_process_that_removes_documents_does_not_disturb_routing(tmp_path, monkeypatch):
    model = build("llama")
    memory = routing(model, path=str(tmp_path / "store"))
    memory.save()
    other = MemoryBackend.open(tmp_path / "store", "manual")
    own = QuestionLikelihood.__call__

    def judge(self, *args, **options):
        found = own(self, *args, **options)
        for name in other.catalog.document_names():
            other.remove_document(name)
        return found

    monkeypatch.setattr(QuestionLikelihood, "__call__", judge)
    routed = memory.route(asked(1))
    assert routed.passages == ()
    assert routed.relevance is not None  # of the places that were judged before
    assert chosen(model, [asked(1)])
    other.close()


def test_threads_route_at_once(world):
    _, memory = world
    prompts = [asked(number) for number in range(3)]
    expected = [memory.route(prompt) for prompt in prompts]
    found = {}

    def run(number):
        found[number] = [memory.route(prompts[number]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [each] * 4 for number, each in enumerate(expected)}


@torch.no_grad()
def test_attention_weights_are_given_as_without_a_judge(world):
    model, memory = world
    prompt = asked(1)[None]
    with memory.using(candidates=0):
        expected = model(prompt, output_attentions=True)
    passages = memory.route(prompt[0]).passages
    found = model(prompt, output_attentions=True)
    with memory.recalling(put(memory.route(prompt[0]))):
        again = model(prompt, output_attentions=True)
    assert passages
    assert [each.shape[:3] for each in found.attentions] == [
        each.shape[:3] for each in expected.attentions
    ]
    for one, other in zip(found.attentions, again.attentions, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype):
    memory = routing(build("llama", dtype=dtype))
    assert math.isfinite(memory.route(asked(1)).relevance)


def test_a_memory_read_in_another_dtype(tmp_path):
    written = routing(build("llama"), path=str(tmp_path / "store"))
    written.save()
    config = written.config
    written.close()
    memory = attach(build("llama", dtype=torch.bfloat16), config)
    exact = routing(build("llama", dtype=torch.bfloat16))
    assert memory.route(asked(1)).relevance == pytest.approx(
        exact.route(asked(1)).relevance, abs=0.3
    )
