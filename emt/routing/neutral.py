"""Whether a passage helps more than just any passage of the same memory does.

Parts of a prompt are likelier after any text at all than after none: instructions on how to answer,
phrases of politeness, the language itself. So a gain over no passage that is neither small nor
large says little; a gain over neutral passages, which nothing has found, says what the passage
itself explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from emt.passage import Passage
from emt.routing.choosing import Budget, choose_passages
from emt.routing.evidence import Window
from emt.routing.judging import telling
from memory_backends import MemoryBackend, Scope

_NUM_NEUTRAL = 4  # one alone may be odd, and explain nothing


def gain_over_neutral(
    gains: Tensor,
    passages: Sequence[Passage],
    gains_after: Callable[[Sequence[Passage]], Tensor],
    backend: MemoryBackend,
    scope: Scope | None,
) -> float:
    """Return by how much the passage that helps most helps more than neutral ones, in nats.

    Args:
        gains: (n, q), by how much n > 0 passages make each token of a question likelier.
        passages: the n passages.
        gains_after: returns the same of other passages.
        backend: where the memories are.
        scope: the rows that may be found; None for all.

    Returns:
        The mean of the three tokens that gain most, as `telling`. No passage is credited with what
        a token gains after one of the neutral passages, taken at random.
    """
    best = passages[int(telling(gains).argmax())]
    num_rows = max(passage.stop - passage.first for passage in passages)
    neutral = neutral_passages(best, num_rows, backend, scope)
    if neutral:
        after_one = gains_after(neutral).logsumexp(dim=0) - math.log(len(neutral))
        gains = gains - after_one.clamp(min=0)
    return float(telling(gains).max())


def neutral_passages(
    best: Passage, num_rows: int, backend: MemoryBackend, scope: Scope | None
) -> list[Passage]:
    """Return up to four passages of other documents than `best` is of, far from each other.

    There are none if it is of the only one: all of its passages may be about what is asked.
    """
    rows = backend.catalog.searchable_rows("all", scope)
    taken = backend.catalog.scope([best.document], missing_ok=True)
    others = rows[~taken.mask(backend.catalog.num_rows)[rows]]
    chosen: dict[Passage, None] = {}
    for part in range(_NUM_NEUTRAL if len(others) else 0):
        peak = int(others[len(others) * (2 * part + 1) // (2 * _NUM_NEUTRAL)])
        around = choose_passages([Window(peak, 0.0)], backend, Budget(num_rows, 1))
        chosen |= {routed.passage: None for routed in around}
    return list(chosen)
