"""Sampled tokens: against probabilities that are computed otherwise."""

import torch
import pytest

from emt.serving.sampling import Sampler, Sampling, sampled

LOGITS = torch.tensor([1.0, 3.0, 0.5, 2.0, -1.0, 3.0])


def frequencies(temperature, top_p, num=4000):
    generator = torch.Generator().manual_seed(5)
    drawn = [sampled(LOGITS, temperature, top_p, generator) for _ in range(num)]
    return torch.bincount(torch.tensor(drawn), minlength=len(LOGITS)) / num


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_have_the_probability_of_the_softmax(temperature):
    expected = (LOGITS / temperature).exp() / (LOGITS / temperature).exp().sum()
    assert (frequencies(temperature, 1.0) - expected).abs().max() < 0.03


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.5, 2), (0.75, 2), (0.9, 3), (1.0, 6)])
def test_top_p_keeps_the_fewest_tokens_with_this_probability(top_p, kept):
    probabilities = LOGITS.exp() / LOGITS.exp().sum()
    order = sorted(range(len(LOGITS)), key=lambda token: -probabilities[token])
    # the fewest that reach it, added up one by one
    total, fewest = 0.0, 0
    while total < top_p - 1e-6:
        total += float(probabilities[order[fewest]])
        fewest += 1
    assert fewest == kept
    expected = torch.zeros(len(LOGITS))
    expected[order[:fewest]] = probabilities[order[:fewest]]
    assert (frequencies(1.0, top_p) - expected / expected.sum()).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
def test_the_smallest_temperatures_take_the_likeliest(temperature):
    logits = torch.tensor([-100.0, 90.0, -torch.inf, 89.0])
    assert sampled(logits, temperature, 1.0, torch.Generator()) == 1


def test_a_row_draws_the_same_in_any_batch():
    scores = torch.randn(8, 3, 50, generator=torch.Generator().manual_seed(1))  # steps, rows
    rows = [Sampling(1.0, 0.9, 7), Sampling(), Sampling(0.7, 1.0, 8)]

    def drawn(*numbers):
        sampler = Sampler([rows[number] for number in numbers])
        steps = [sampler(torch.empty(0), step[list(numbers)]).argmax(-1) for step in scores]
        return torch.stack(steps)

    together = drawn(0, 1, 2)
    for number in range(3):
        assert torch.equal(drawn(number)[:, 0], together[:, number])
    assert torch.equal(together[:, 1], scores[:, 1].argmax(-1))  # greedy
    assert not torch.equal(together[:, 0], scores[:, 0].argmax(-1))


def test_without_a_seed_each_run_is_another_one():
    scores = torch.zeros(1, 10_000)
    drawn = {int(Sampler([Sampling(1.0)])(torch.empty(0), scores).argmax()) for _ in range(8)}
    assert len(drawn) > 1
