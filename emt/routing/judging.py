"""Asking back: how likely the question is after a passage tells whether the passage answers it.

The rows of candidate passages are stored, so the model can be asked how likely the prompt's own
question is after each of them, and after none. A passage that the question is about makes the
question likelier: passages are put in order by that, beside what found them; and a prompt that no
passage makes much likelier is about nothing in the memory.

Source: Sachan et al., Improving Passage Retrieval with Zero-Shot Question Generation (arXiv
2204.07496) for the order. To compare with no passage is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import numpy as np
from torch import Tensor

from emt.passage import Passage
from emt.routing.choosing import Budget, choose_passages
from emt.routing.evidence import Window
from emt.routing.fusion import Place
from emt.routing.question import Asking
from emt.routing.recency import newest_of_same, times_of
from memory_backends import MemoryBackend

_NUM_TELLING = 3  # tokens
_FAR = 8.0  # nats
_NUM_FIRST = 4  # places that are judged before the others,
SURE = 4.0  # which are left out if one of these gains so many nats: few gain as much by chance


class Judge(Protocol):
    """Tells how likely a question is after passages."""

    def __call__(
        self,
        asking: Asking,
        passages: Sequence[Passage],
        backend: MemoryBackend,
        *,
        beside: Sequence[Passage] | None = None,
    ) -> Tensor:
        """Return log-probabilities of the tokens that ask, after each of n passages and none.

        Args:
            asking: what is read of a prompt.
            passages: n passages, each tried alone.
            backend: where their rows are.
            beside: n passages, each put between one of the others and the question; None for none.

        Returns:
            (n + 1, q) float32, in nats; the last row is after no passage.
        """


class Judged(NamedTuple):
    """Places, as the question's likelihood judges them.

    Attributes:
        windows: best first.
        num_likely: how many of them are not far less likely than the best, to be what is asked for.
        gain: by how much the one that helps most makes the question likelier than none does, in
            nats: the mean of the three tokens that gain most. None if there was no token to judge.
    """

    windows: list[Window]
    num_likely: int
    gain: float | None


def judged(
    places: Sequence[Place],
    ask_back: Callable[[Sequence[Passage]], Tensor],
    backend: MemoryBackend,
    num_rows: int,
) -> Judged:
    """Judge some places by passages of at most `num_rows` rows around them.

    The first four are judged before the others, and alone if they leave no doubt. The order is that
    of the question's likelihood times the square of the prior, as a posterior probability. Whether
    places are relevant is told by few tokens, names and the like: the others are as likely after
    anything, and there may be many, in instructions.
    """
    kept: list[Place] = []
    passages: list[Passage] = []
    of_waves: list[Tensor] = []
    for wave in (places[:_NUM_FIRST], places[_NUM_FIRST:]):
        around = [choose_passages([place.window], backend, Budget(num_rows, 1)) for place in wave]
        kept += [place for place, routed in zip(wave, around, strict=True) if routed]
        found = [routed[0].passage for routed in around if routed]
        if found:
            passages += found
            of_waves.append(gains_of(ask_back(found)))
        if any(_leave_no_doubt(gains) for gains in of_waves):
            break
    if not kept:
        return Judged([], 0, None)
    gains, windows = torch.cat(of_waves), [place.window for place in kept]
    if not gains.shape[1]:
        return Judged(windows, len(windows), None)
    posterior = gains.sum(dim=1).numpy() + 2 * np.log([place.prior for place in kept])
    order = np.argsort(-posterior, kind="stable").tolist()
    num_likely = int((posterior >= posterior.max() - _FAR).sum())
    times = times_of(passages, backend)
    missed = telling((gains[order[0]] - gains).clamp(min=0))
    order = newest_of_same(order, posterior, missed, times)
    return Judged([windows[i] for i in order], num_likely, float(telling(gains).max()))


def _leave_no_doubt(gains: Tensor) -> bool:
    """Tell whether a passage makes the question so much likelier that others need not be tried."""
    return gains.shape[1] > 0 and float(telling(gains).max()) >= SURE


def gains_of(log_probs: Tensor) -> Tensor:
    """Return by how much passages make tokens likelier than none does: (n + 1, q) -> (n, q).

    A token that a model never says, or whose likelihood it fails to compute, gains nothing.
    """
    gains = log_probs[:-1] - log_probs[-1]
    return gains.where(gains.isfinite(), 0.0)


def telling(gains: Tensor) -> Tensor:
    """Return the mean of the three largest gains of tokens: (..., q) -> (...)."""
    return gains.topk(min(_NUM_TELLING, gains.shape[-1])).values.sum(dim=-1) / _NUM_TELLING
