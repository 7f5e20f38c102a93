"""A trial of heads: the evidence of each window, compared with sums over tokens, one by one."""

import torch
import pytest

from emt import attach
from emt.profiles import trial
from emt.profiles.trial import DISTANCE, HeadReader, Trial, _Progress, _read_prompts
from emt.routing.queries import unit_queries
from tests.emt.routing.worlds import attached_model
from tests.emt.words import word_tokenizer
from tests.families import build


def trial_of(num_rows=200, lengths=(3, 5), answers=(20.0, 150.0), seed=0):
    """A trial of random keys and queries: one layer of 4 query heads and 2 KV heads."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(2, num_rows, 8, generator=generator), dim=-1)
    queries = torch.randn(4, sum(lengths), 8, generator=generator)
    is_sink = torch.zeros(num_rows, dtype=torch.bool)
    is_sink[:4] = True
    return Trial(
        {0: keys}, is_sink, {0: queries}, list(lengths), list(answers), {0: queries.mean(1)}
    )


def evidence_by_hand(trial, head):
    """Sum over tokens the best excess in each window over the k-th best block of 16 rows."""
    keys, num_rows = trial.keys[0][head // 2], len(trial.is_sink)
    starts = range(0, num_rows, 16)
    k = -(-len(starts) // 4)
    evidence = torch.zeros(len(trial.lengths), len(starts) - 3)
    token = 0
    for question, length in enumerate(trial.lengths):
        for query in trial.queries[0][head][token : token + length]:
            scores = [
                float((query - trial.means[0][head]) @ key) if row >= 4 else -torch.inf
                for row, key in enumerate(keys)
            ]
            blocks = [max(scores[start : start + 16]) for start in starts]
            least = sorted(blocks)[-k]
            for window in range(len(starts) - 3):
                best = max(blocks[window : window + 4])
                evidence[question, window] += max(best - least, 0)
        token += length
    return evidence


@pytest.mark.parametrize("num_rows", [200, 208, 64])
def test_evidence_is_a_sum_of_maxima(num_rows):
    trial = trial_of(num_rows)
    assert trial.heads == [(0, 0), (0, 1), (0, 2), (0, 3)]
    by_hand = [evidence_by_hand(trial, head) for head in range(4)]
    for head in range(4):
        torch.testing.assert_close(trial.evidence([(0, head)]), by_hand[head])
    torch.testing.assert_close(trial.evidence([(0, 1), (0, 2)]), by_hand[1] + by_hand[2])


def test_more_queries_than_are_searched_at_once():
    trial = trial_of(lengths=(300, 2))
    torch.testing.assert_close(
        trial.evidence([(0, 3)]), evidence_by_hand(trial, 3), atol=1e-3, rtol=1e-4
    )


def test_deviations_of_the_answer_from_other_places():
    trial = trial_of()
    # Ten windows, whose middles are rows 32, 48, ... 176.
    evidence = torch.tensor(
        [[1, 9, 2, 3, 4, 5, 6, 3, 3, 4], [7, 1, 2, 3, 1, 2, 4, 1, 5, 2]]
    ).float()
    deviations, is_first = trial.deviations(evidence)
    near = ([0, 1, 2], [5, 6, 7, 8, 9])
    for question in range(2):
        others = [float(evidence[question, at]) for at in range(10) if at not in near[question]]
        best = max(float(evidence[question, at]) for at in near[question])
        mean = sum(others) / len(others)
        deviation = (sum((value - mean) ** 2 for value in others) / len(others)) ** 0.5
        assert float(deviations[question]) == pytest.approx((best - mean) / deviation, rel=1e-5)
    assert is_first.tolist() == [True, False]


def test_one_question_counts_for_20_deviations_at_most():
    evidence = torch.zeros(2, 10)
    evidence[:, 0] = 4
    deviations, is_first = trial_of().deviations(evidence)
    assert deviations[0] == pytest.approx(20)  # nothing else was found
    assert is_first.tolist() == [True, False]
    nothing, _ = trial_of().deviations(torch.zeros(2, 10))
    assert nothing.tolist() == [0, 0]


def test_texts_shorter_than_a_window():
    trial = trial_of(num_rows=20, answers=(8.0, 12.0))
    evidence = trial.evidence([(0, 0)])
    assert evidence.shape == (2, 1)
    assert torch.isfinite(trial.deviations(evidence)[0]).all()


def test_queries_of_prompts_stand_in_their_order_whatever_forwards_they_share(monkeypatch):
    monkeypatch.setattr(trial, "_TOKENS_AT_ONCE", 24)
    memory = attach(build("llama"), tokenizer=word_tokenizer())
    model, shapes = attached_model(memory), []
    reader = HeadReader(model, word_tokenizer(), memory.read)
    prompts = [(torch.arange(4, 4 + length), length // 2) for length in (5, 11, 12, 4, 12)]
    hook = model.decoder().register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)),
        with_kwargs=True,
    )
    counts = []
    queries = _read_prompts(reader, prompts, _Progress(lambda *count: counts.append(count), 44))
    hook.remove()
    assert [shape for shape in shapes if shape != (1, 1)] == [(2, 12), (1, 11), (2, 5)]
    assert counts[-1] == (44, 44)
    for layer, of_layer in queries.items():
        alone = [
            unit_queries(model, ids, [layer], distance=DISTANCE)[layer][:, first:]
            for ids, first in prompts
        ]
        torch.testing.assert_close(of_layer, torch.cat(alone, 1))
