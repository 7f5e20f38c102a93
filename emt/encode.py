"""Documents to rows: token ids -> windows -> keys and values of every layer.

Windows start every `stride` tokens and take up to `max_length`, positions from 0 in each; the model
reads each one plainly, and only the tail that the window before did not reach is kept. So a row has
between `max_length - stride` and `max_length` tokens of left context, once the document is long
enough.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), section 3.1 and the
published `generate_cache`; for attention sinks, Xiao et al., StreamingLLM (arXiv 2309.17453), which
finds four enough.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from emt.errors import ConfigError
from emt.hook import watching
from emt.rope import Unrotation
from memory_backends import Rows

SINK_ROWS = 4


class Window(NamedTuple):
    """Tokens `start` to `stop` are read, rows `keep_from` to `stop` are kept."""

    start: int
    stop: int
    keep_from: int


def windows(num_tokens: int, stride: int, max_length: int) -> Iterator[Window]:
    """Cut a document into encoding windows that together keep each token once."""
    kept = 0
    for start in range(0, num_tokens, stride):
        stop = min(start + max_length, num_tokens)
        yield Window(start, stop, kept)
        kept = stop
        if stop == num_tokens:
            return


def check_max_length(config: object, max_length: int) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        ConfigError: naming both numbers.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and max_length > positions:
        raise ConfigError(
            f"max_length ({max_length}) must be at most the model's {positions} positions. "
            f"Set max_length={positions} or less in the memory config."
        )


def input_device(decoder: PreTrainedModel) -> torch.device:
    """Return the device that a model takes its token ids on."""
    return cast(nn.Embedding, decoder.get_input_embeddings()).weight.device


@torch.no_grad()
def encode(
    decoder: nn.Module,
    token_ids: torch.Tensor,
    *,
    stride: int,
    max_length: int,
    unrotations: Mapping[int, Unrotation | None],
    drop_ids: Collection[int] = (),
) -> Iterator[Rows]:
    """Read one document, window by window.

    Args:
        decoder: the model without its language-model head, attached or being attached.
        token_ids: (T,) int64, on the model's device.
        stride: tokens between the starts of two windows.
        max_length: tokens in a window, at least `stride`.
        unrotations: layer -> how to bring its keys to position 0; None leaves them where they are.
        drop_ids: token ids whose rows are left out, after the others have attended to them.

    Yields:
        The rows of one window, in order; layers are the keys of `unrotations`.
    """
    dropped = torch.tensor(sorted(drop_ids), dtype=token_ids.dtype, device=token_ids.device)
    for window in windows(len(token_ids), stride, max_length):
        kept = torch.arange(window.keep_from, window.stop, device=token_ids.device)
        kept = kept[~torch.isin(token_ids[kept], dropped)]
        with watching(decoder) as seen:
            decoder(input_ids=token_ids[None, window.start : window.stop], use_cache=False)
        keys, values = {}, {}
        for call in seen.calls:
            if call.layer_idx not in unrotations:
                continue
            key = call.key
            unrotate = unrotations[call.layer_idx]
            if unrotate is not None:
                key = unrotate(key, seen.position_embeddings[call.module])
            at = (kept - window.start).to(key.device)
            keys[call.layer_idx] = key[0].index_select(1, at)  # (Hkv, n, D)
            values[call.layer_idx] = call.value[0].index_select(1, at)  # (Hkv, n, Dv)
        tokens = kept.cpu().numpy().astype(np.int32)
        yield Rows(keys, values, tokens, sinks=tokens - window.start < SINK_ROWS)
