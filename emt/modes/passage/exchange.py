"""Other passages in the place of those that a prompt has: as many rows, so that no token moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from emt.errors import ConfigError, DocumentError
from emt.modes.passage.rows import Place, RecalledRows, places
from emt.passage import Passage, Routed, RoutedPassage
from memory_backends import MemoryBackend

_TRIES = 4  # a passage that has grown may need other attention sinks before it


def exchanged(
    rows: RecalledRows, prompt: int, routed: Routed, backend: MemoryBackend
) -> tuple[Place, Routed] | None:
    """Fit passages into the place of those that a prompt has.

    Args:
        rows: what is recalled.
        prompt: which of its prompts.
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
    best = [one.passage for one in routed.passages]
    kept = set(rows.ids[prompt, :count].tolist())
    wanted = places(backend, [best[:1]], [at], False)[0].ids
    if 2 * len(kept.intersection(wanted)) >= min(len(wanted), count):
        return None
    sizes = {one.document: len(backend.catalog.document(one.document).row_tokens) for one in best}
    num_sinks = 0
    for _ in range(_TRIES):
        fitted = _fitted(best, sizes, count - num_sinks)
        if fitted is None:
            return None
        try:
            (place,) = places(backend, [fitted[::-1]], [at], None)
        except (ConfigError, DocumentError):  # it has grown into sinks, or rows that were removed
            return None
        if len(place.ids) == count:
            scores = [one.score for one in routed.passages]
            found = map(RoutedPassage, fitted, scores)
            return place, replace(routed, passages=tuple(found))
        num_sinks += len(place.ids) - count
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
    found: list[Passage] = []
    left = count
    for passage in passages:
        length = min(passage.stop - passage.first, left)
        if length > 0:
            found.append(replace(passage, stop=passage.first + length))
            left -= length
    for index, passage in enumerate(found):
        others = [one for one in found if one.document == passage.document and one != passage]
        above = [one.first for one in others if one.first >= passage.stop]
        below = [one.stop for one in others if one.stop <= passage.first]
        stop = min(passage.stop + left, *above, sizes[passage.document])
        left -= stop - passage.stop
        first = max(passage.first - left, *below, 0)
        left -= passage.first - first
        found[index] = replace(passage, first=first, stop=stop)
    return found if found and not left else None


def with_others(rows: RecalledRows, others: Mapping[int, RecalledRows]) -> RecalledRows:
    """Return recalled rows in which some prompts have others.

    Args:
        rows: of n prompts.
        others: prompt -> rows of one prompt, as many and before the same token.
    """

    def put(
        parts: Mapping[int, Tensor], new: Mapping[int, Mapping[int, Tensor]]
    ) -> dict[int, Tensor]:
        found = {}
        for layer_idx, part in parts.items():
            found[layer_idx] = part.clone()
            for prompt, layers in new.items():
                count = layers[layer_idx].shape[2]
                found[layer_idx][prompt, :, :count] = layers[layer_idx][0]
        return found

    ids = rows.ids.clone()
    for prompt, other in others.items():
        ids[prompt, : other.ids.shape[1]] = other.ids[0]
    return replace(
        rows,
        ids=ids,
        keys=put(rows.keys, {prompt: other.keys for prompt, other in others.items()}),
        values=put(rows.values, {prompt: other.values for prompt, other in others.items()}),
        _repeated={},
    )
