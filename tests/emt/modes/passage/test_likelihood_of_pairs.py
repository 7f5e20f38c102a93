"""How likely a question is after two passages: as after both, recalled."""

import torch

from emt import Passage
from emt.modes.passage.likelihood import QuestionLikelihood
from emt.routing.question import Asking
from tests.emt.routing.worlds import attached_model, build, routing, tokens


def test_pairs_are_as_likely_after_as_with_both_recalled():
    model = build("llama")
    memory, asked = routing(model), tokens(9, 5)
    first = [Passage("one", 3, 12), Passage("two", 0, 7)]
    last = [Passage("three", 20, 31), Passage("two", 30, 33)]
    likelihood = QuestionLikelihood(attached_model(memory))
    found = likelihood(Asking(asked, 0, list(range(9))), first, memory.backend, beside=last)
    for pair, log_probs in zip([*zip(first, last, strict=True), ()], found, strict=True):
        with torch.no_grad(), memory.recalling(pair):
            logits = model(asked[None]).logits[0]
        expected = logits.log_softmax(-1)[:-1].gather(-1, asked[1:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
