"""How far the queries of a layer see: everything, a window, or their own chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from emt.errors import UnsupportedModelError
from emt.model.attention_call import AttentionCall


@dataclass(frozen=True)
class Reach:
    """How far the queries of a layer see.

    Attributes:
        size: positions; None for all.
        is_chunked: they see those of their own chunk of `size` positions, not the last `size`.
    """

    size: int | None = None
    is_chunked: bool = False


def reach_of(config: PreTrainedConfig, call: AttentionCall) -> Reach:
    """Return how far a layer sees.

    Raises:
        UnsupportedModelError: it does not see everything, and nothing says how far.
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[call.layer_idx] if kinds and call.layer_idx < len(kinds) else ""
    size: Any
    if "chunked" in kind:
        size = getattr(config, "attention_chunk_size", None)
    elif "sliding" in kind or not kind:
        size = call.options.get("sliding_window")
        size = getattr(config, "sliding_window", None) if size is None and kind else size
    elif "window" in kind:
        size = None
    else:
        return Reach()
    if size is None and kind:
        raise UnsupportedModelError(
            f"{config.model_type}: layer {call.layer_idx} is of the kind '{kind}' and does not say "
            "how many tokens it sees, so passages cannot be put into its context."
        )
    return Reach(size, "chunked" in kind)
