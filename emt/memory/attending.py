"""One layer's attention in a model with a memory: recall, retrieve, record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from emt.model.hook import AttentionCall, wants_weights
from emt.modes.passage.recall import running_recall
from emt.modes.passage.weights import record_recalled
from emt.modes.token.attend import Attended, attend_with_memories, with_local_weights

if TYPE_CHECKING:
    from emt.memory.memory import Memory


def attend(memory: Memory, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to local tokens, to recalled passages and to memories: whatever this call is given.

    Returns:
        As the call's own `compute`: the output, and attention weights if they are asked for.
    """
    recall, recordings, retrieves = running_recall(), memory.recordings, True
    if recall is not None:
        placed = recall.place(call)
        retrieves = placed is call or recall.retrieves  # a cache's, whatever the mode is now
        call = placed
    attended = _attended(memory, call, recorded=bool(recordings), retrieves=retrieves)
    frame = None if recall is None else recall.frame
    if recall is not None and frame is not None:
        if recordings:
            record_recalled(call, frame, recordings, attended.retrieved)
        for recording in recordings:
            recording.recall(recall.passages)
    elif attended.retrieved is not None:
        for recording in recordings:
            recording.add(attended.retrieved)
    return attended.output, attended.weights


def _attended(memory: Memory, call: AttentionCall, *, recorded: bool, retrieves: bool) -> Attended:
    """Attend to single memories, too, where this layer does."""
    if not (retrieves and memory.is_read):
        output, weights = call.compute()
        return Attended(output, None, weights)
    weighed = wants_weights(call)
    if not memory.reads(call.layer_idx):
        output, weights = with_local_weights(call) if weighed else call.compute()
        return Attended(output, None, weights)
    return attend_with_memories(
        call,
        memory.backend,
        memory.in_force,
        recorded=recorded,
        weighed=weighed,
        scope=memory.scope,
    )
