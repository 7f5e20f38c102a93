"""What was said later holds: of two turns of conversations about the same, the newer comes first.

Both stay where there is room for both; the first one stands next to the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from emt.passage import Passage
from memory_backends import MemoryBackend
from memory_backends.errors import DocumentError

_LEAST_SHARE = 0.75  # of the nats of the best
_LEAST_MISSED = 1.5  # nats a token


def times_of(passages: Sequence[Passage], backend: MemoryBackend) -> npt.NDArray[np.float64]:
    """Return when the documents of passages were said, (n,) in seconds; NaN for other documents.

    What was said has `conversation` and `time` in its metadata, as `remember_turn` writes it.
    """
    return np.array([_time_of(passage, backend) for passage in passages], dtype=np.float64)


def _time_of(passage: Passage, backend: MemoryBackend) -> float:
    try:
        about = backend.catalog.metadata(passage.document)
    except DocumentError:  # another process has removed it
        return np.nan
    time = about.get("time")
    if "conversation" not in about or isinstance(time, bool | str) or time is None:
        return np.nan
    return float(time)


def newest_of_same(
    order: Sequence[int],
    posterior: npt.NDArray[np.floating[Any]],
    missed: Tensor,
    times: npt.NDArray[np.float64],
) -> list[int]:
    """Return an order of n places in which the first is the newest of those that say the same.

    A newer place says the same as the best if it is not much less likely, and misses little of what
    the best explains.

    Args:
        order: of the places, best first.
        posterior: (n,) log-probabilities, in nats.
        missed: (n,) by how much the tokens that tell most are likelier after the best than after
            each, in nats a token.
        times: (n,) as `times_of`.
    """
    best = order[0]
    is_same = (posterior >= _LEAST_SHARE * posterior[best]) & (missed.numpy() < _LEAST_MISSED)
    newer = np.flatnonzero(is_same & (times > times[best]))
    if not len(newer):
        return list(order)
    newest = int(newer[times[newer].argmax()])
    return [newest, *(place for place in order if place != newest)]
