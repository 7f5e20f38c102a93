"""Right or wrong: the published score, and what it is too coarse for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.items import Item


def is_right(text: str, answer: str) -> bool:
    """Tell whether an answer is in a text, whatever their case.

    Source:
        Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332): 30 greedy tokens.
    """
    return answer.lower() in text.lower()


def candidates_of(item: Item) -> list[str]:
    """Return what a model's log-probabilities are asked for: the answer, then the original one."""
    return [item.answer] if item.original_answer is None else [item.answer, item.original_answer]


def scores(item: Item, text: str, log_probs: Sequence[float] | None) -> dict[str, Any]:
    """Score one answer.

    Args:
        item: what was asked.
        text: what was said.
        log_probs: of `candidates_of(item)`, mean per token; None if the model does not tell.

    Returns:
        `right`; `original`, whether the original answer was said (also beside the right one);
        `log_prob` and `original_log_prob`; `preferred`, whether the first is above the second.
        None for what is not known.
    """
    original = item.original_answer
    log_prob = log_probs[0] if log_probs else None
    original_log_prob = log_probs[1] if log_probs and len(log_probs) > 1 else None
    preferred = None
    if log_prob is not None and original_log_prob is not None:
        preferred = log_prob > original_log_prob
    return {
        "right": is_right(text, item.answer),
        "original": None if original is None else is_right(text, original),
        "log_prob": log_prob,
        "original_log_prob": original_log_prob,
        "preferred": preferred,
    }
