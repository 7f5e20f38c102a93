"""Passages that answer a question together: what adds to the best, and what it leads to."""

import math
from dataclasses import replace

import torch
import pytest

from emt.routing.choosing import Budget
from emt.routing.evidence import Window
from emt.routing.links import LinkIndex
from emt.routing.together import Follower, passage_around, together
from tests.emt.routing.worlds import build, routing
from tests.emt.words import word_tokenizer

BUDGET = Budget(48, 3)
MARTA, ORSK, VARN = "w50", "w60", "w70"
TEXTS = {
    MARTA: "w3 w4 w5 w6 w7 w8 w60 w9 w10 w11 w12 w13",
    ORSK: "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29",
    VARN: "w30 w31 w32 w33 w34 w35 w36 w37 w38 w39",
}
NAMES_TWO = "w50 w70"  # then nothing is followed


@pytest.fixture(scope="module")
def memory():
    memory = routing(build("llama"), tokenizer=word_tokenizer())
    for name, text in TEXTS.items():
        memory.write(text, document=name)
    return memory


def window(memory, name, row=4):
    first = memory.backend.catalog.document(name).first_row
    return Window(first + row, 0.5, first)


def windows_and_gains(memory, gains):
    windows = [window(memory, name) for name in gains]
    around = [passage_around(each, memory.backend, 16) for each in windows]
    rows = (torch.tensor(row, dtype=torch.float32) for row in gains.values())
    return windows, dict(zip(around, rows, strict=True))


def follower(
    memory, question="w3 w20", *, find=None, log_probs=None, alone=-8.0, scope=None, asked=None
):
    """Return a follower to whom pairs are as likely as `log_probs` says of their documents.

    Documents that are named are as likely as `alone`, if no passage is beside them; none is -9.
    """

    def ask_back(passages, beside):
        if beside is None:
            return torch.tensor([*([alone] for _ in passages), [-9.0]])
        pairs = [
            (one.document, other.document) for one, other in zip(beside, passages, strict=True)
        ]
        if asked is not None:
            asked.extend(pairs)
        return torch.tensor([*([log_probs[pair]] for pair in pairs), [-9.0]])

    return Follower(
        question,
        LinkIndex(),
        memory.tokenizer,
        memory.backend,
        scope,
        find
        or (lambda scope: [window(memory, name) for name in TEXTS if has(memory, scope, name)]),
        ask_back,
    )


def has(memory, scope, name):
    first = memory.backend.catalog.document(name).first_row
    return any(low <= first < high for low, high in scope.spans)


def joined(windows, gains, follower, num_likely=3):
    """Return what windows give together, of which some are likely."""
    return together(windows, num_likely, gains, BUDGET, follower)


# -- what adds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "third", "order", "num_needed"),
    [
        # The second says again what the first says, and the third explains the last token.
        ([5.0, 5.0, 0.0], [0.0, 0.0, 3.0], ["one", "three", "two"], 2),
        # Each explains a token: by 3 nats, which is 1 of the three tokens that gain most.
        ([0.0, 8.0, 0.0], [0.0, 0.0, 3.0], ["one", "two", "three"], 3),
        # Too little: but the best alone would be too few.
        ([5.0, 6.0, 2.9 - 1.0], [0.0, 0.0, 2.9], ["one", "two", "three"], 3),
        # What makes tokens less likely does not count against the others.
        ([-9.0, 5.0, 3.0], [0.0, 0.0, 2.0], ["one", "two", "three"], 2),
    ],
)
def test_passages_that_explain_other_tokens_come_first(memory, second, third, order, num_needed):
    gains = {"one": [5.0, 5.0, 0.0], "two": second, "three": third}
    windows, gains = windows_and_gains(memory, gains)
    found = joined(windows, gains, follower(memory, NAMES_TWO))
    assert found.windows == [window(memory, name) for name in order]
    assert found.num_needed == num_needed


def test_one_window_is_enough_of_itself(memory):
    windows, gains = windows_and_gains(memory, {"one": [1.0, 2.0]})
    assert joined(windows, gains, follower(memory, NAMES_TWO)).windows == windows


def test_what_is_unlikely_or_beside_a_better_one_is_left_out(memory):
    gains = {"one": [5.0, 5.0], "two": [5.0, 4.0], "three": [4.0, 4.0]}
    windows, gains = windows_and_gains(memory, gains)
    pairs = follower(memory, NAMES_TWO)
    for num_likely in (1, 2, 3):
        found = joined(windows, gains, pairs, num_likely)
        assert found.windows == windows[:num_likely]
    peak = windows[0].peak
    for distance, expected in ((BUDGET.num_rows // 2 - 1, 1), (BUDGET.num_rows // 2, 2)):
        near = [windows[0], replace(windows[0], peak=peak + distance)]  # of 70 rows
        share = BUDGET.num_rows // BUDGET.num_passages
        around = [passage_around(each, memory.backend, share) for each in near]
        of_passages = dict.fromkeys(around, torch.tensor([5.0, 5.0]))
        assert len(joined(near, of_passages, pairs).windows) == expected


def test_what_was_not_judged_stays_in_its_order(memory):
    windows, gains = windows_and_gains(memory, {"one": [1.0], "two": [2.0]})
    del gains[next(iter(gains))]
    assert joined(windows, gains, follower(memory, NAMES_TWO)) == (
        windows,
        3,
    )


# -- what is led to ---------------------------------------------------------------------------


def test_a_document_that_the_best_passage_names_comes_second(memory):
    windows, gains = windows_and_gains(memory, {MARTA: [5.0, 0.0], VARN: [0.0, 4.0]})
    asked = []
    pairs = follower(memory, log_probs={(MARTA, ORSK): -2.0}, asked=asked)
    found = joined(windows, gains, pairs)
    assert asked == [(MARTA, ORSK)]
    assert found.windows == [window(memory, name) for name in (MARTA, ORSK, VARN)]
    assert found.num_needed == 2  # the third explains nothing that the pair does not


def test_a_window_that_is_led_to_is_not_there_twice(memory):
    windows, gains = windows_and_gains(memory, {MARTA: [5.0, 0.0], ORSK: [0.0, 4.0]})
    found = together(
        windows, len(windows), gains, BUDGET, follower(memory, log_probs={(MARTA, ORSK): -2.0})
    )
    assert found == (windows, 2)


def test_a_likelier_pair_takes_the_place_of_the_best_passage(memory):
    gains = {VARN: [3.0, 1.0], MARTA: [3.0, 0.0]}
    windows, gains = windows_and_gains(memory, gains)
    for log_prob, order in {-4.5: [MARTA, ORSK, VARN], -5.5: [VARN, MARTA]}.items():
        # After the pair the question gains 9 nats less these; after the best alone, 4.
        found = joined(windows, gains, follower(memory, log_probs={(MARTA, ORSK): log_prob}))
        assert found.windows == [window(memory, name) for name in order]


@pytest.mark.parametrize("question", ["w20 w60", NAMES_TWO])
def test_nothing_is_followed_that_the_question_names_itself(memory, question):
    windows, _ = windows_and_gains(memory, {MARTA: [5.0]})
    assert follower(memory, question).pair(windows, 0.0, 16) is None


def test_only_documents_in_scope_are_followed(memory):
    windows, _ = windows_and_gains(memory, {MARTA: [5.0]})
    catalog, log_probs = memory.backend.catalog, {(MARTA, ORSK): -2.0}
    inside = follower(memory, scope=catalog.scope([MARTA, ORSK]), log_probs=log_probs)
    number, found, gains = inside.pair(windows, 0.0, 16)
    assert (number, found, gains.tolist()) == (0, window(memory, ORSK), [7.0])
    outside = follower(memory, scope=catalog.scope([MARTA, VARN]))
    assert outside.pair(windows, 0.0, 16) is None


@pytest.mark.parametrize("alone", [-9.0, -10.0, -math.inf, math.nan])
def test_documents_that_do_not_help_by_themselves_are_not_followed(memory, alone):
    windows, _ = windows_and_gains(memory, {MARTA: [5.0]})
    pairs = follower(memory, log_probs={(MARTA, ORSK): -2.0}, alone=alone)
    assert pairs.pair(windows, 0.0, 16) is None


def test_a_third_passage_must_add_to_the_pair(memory):
    windows, gains = windows_and_gains(memory, {MARTA: [5.0], VARN: [7.9]})
    for log_prob, num_needed in {-4.0: 2, -4.2: 3}.items():
        # The pair gains 5 or 4.8 nats, of which the third passage would have to gain 3 more.
        pairs = follower(memory, log_probs={(MARTA, ORSK): log_prob})
        assert joined(windows, gains, pairs).num_needed == num_needed


def test_a_title_of_many_documents_names_none_of_them():
    memory = routing(build("llama"), tokenizer=word_tokenizer())
    memory.write(TEXTS[MARTA], document=MARTA)
    for number in range(9):
        memory.write(TEXTS[ORSK], document=f"{number}/{ORSK}")
    windows, _ = windows_and_gains(memory, {MARTA: [5.0]})
    assert follower(memory).pair(windows, 0.0, 16) is None


def test_documents_without_a_window_are_left_out(memory):
    windows, _ = windows_and_gains(memory, {MARTA: [5.0]})
    assert follower(memory, find=lambda scope: []).pair(windows, 0.0, 16) is None


def test_without_text_nothing_is_followed():
    memory = routing(build("llama"))
    windows, gains = windows_and_gains(memory, {"two": [5.0], "one": [0.0]})
    assert joined(windows, gains, follower(memory)).windows == windows
