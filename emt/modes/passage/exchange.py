"""Other passages in the place of those that a prompt has: as many rows, so that no token moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from emt.errors import ConfigError, DocumentError
from emt.modes.passage.locate import Placement, locate
from emt.modes.passage.rows import PlacedRows
from emt.passage import Passage, Routed, RoutedPassage
from memory_backends import MemoryBackend

_TRIES = 4  # a passage that has grown may need other attention sinks before it


def exchanged(
    rows: PlacedRows, prompt: int, routed: Routed, backend: MemoryBackend
) -> tuple[Placement, Routed] | None:
    """Fit passages into the place of those that a prompt has.

    Args:
        rows: the rows of several prompts.
        prompt: which of the prompts.
        routed: what the prompt is about now.
        backend: where the rows are.

    Returns:
        As many rows as the prompt has, and the passages they are of. None if it keeps what it has:
        nothing is relevant, or half of the best passage is recalled already, or not enough rows are
        around the new passages.
    """
    count, at = int(rows.lengths[prompt]), int(rows.at[prompt])
    if not routed.passages or not count:
        return None
    best = [candidate.passage for candidate in routed.passages]
    present = set(rows.ids[prompt, :count].tolist())
    wanted = locate(backend, [best[:1]], [at], sinks=False)[0].ids
    if 2 * len(present.intersection(wanted)) >= min(len(wanted), count):
        return None
    sizes = {
        passage.document: len(backend.catalog.document(passage.document).row_tokens)
        for passage in best
    }
    num_sinks = 0
    for _ in range(_TRIES):
        fitted = _fitted(best, sizes, count - num_sinks)
        if fitted is None:
            return None
        try:
            (placement,) = locate(backend, [fitted[::-1]], [at])
        except (ConfigError, DocumentError):  # it has grown into sinks, or rows that were removed
            return None
        if len(placement.ids) == count:
            scores = [candidate.score for candidate in routed.passages]
            return placement, replace(routed, passages=tuple(map(RoutedPassage, fitted, scores)))
        num_sinks += len(placement.ids) - count
    return None


def _fitted(
    passages: Sequence[Passage], sizes: Mapping[str, int], count: int
) -> list[Passage] | None:
    """Cut the last passages, or let the first ones grow, until they have `count` rows.

    Args:
        passages: best first; none shares rows with another.
        sizes: rows of each document.
        count: rows of all together.
    """
    fitted: list[Passage] = []
    left = count
    for passage in passages:
        length = min(passage.stop - passage.first, left)
        if length > 0:
            fitted.append(replace(passage, stop=passage.first + length))
            left -= length
    for index, passage in enumerate(fitted):
        others = [
            other for other in fitted if other.document == passage.document and other != passage
        ]
        above = [other.first for other in others if other.first >= passage.stop]
        below = [other.stop for other in others if other.stop <= passage.first]
        stop = min(passage.stop + left, *above, sizes[passage.document])
        left -= stop - passage.stop
        first = max(passage.first - left, *below, 0)
        left -= passage.first - first
        fitted[index] = replace(passage, first=first, stop=stop)
    return fitted if fitted and not left else None


def with_others(rows: PlacedRows, others: Mapping[int, PlacedRows]) -> PlacedRows:
    """Return placed rows in which some prompts have others.

    Args:
        rows: of n prompts.
        others: prompt -> rows of one prompt, as many and before the same token.
    """

    def put(
        layers: Mapping[int, Tensor], new: Mapping[int, Mapping[int, Tensor]]
    ) -> dict[int, Tensor]:
        changed = {}
        for layer_idx, part in layers.items():
            changed[layer_idx] = part.clone()
            for prompt, new_layers in new.items():
                count = new_layers[layer_idx].shape[2]
                changed[layer_idx][prompt, :, :count] = new_layers[layer_idx][0]
        return changed

    ids = rows.ids.clone()
    for prompt, other in others.items():
        ids[prompt, : other.ids.shape[1]] = other.ids[0]
    return replace(
        rows,
        ids=ids,
        keys=put(rows.keys, {prompt: other.keys for prompt, other in others.items()}),
        values=put(rows.values, {prompt: other.values for prompt, other in others.items()}),
        _repeated={},
        _key_lengths={},
    )
