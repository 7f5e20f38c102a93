"""`TokenMode`: at every layer and head, each query attends to the memories nearest to it.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332).
"""

from __future__ import annotations

from typing import Any

from emt.calls import GenerateOptions
from emt.config import MemoryConfig
from emt.model.attention_call import AttentionCall
from emt.model.forward import Forward
from emt.modes.guard import refuse_weights_of_drafts
from emt.modes.token.attend import attend_to_memories, with_local_weights
from emt.modes.token.redo import check_can_redo
from emt.modes.token.search import MemorySearch
from emt.turn import Attended, Turn
from memory_backends import MemoryBackend


class TokenMode:
    """The published method. Forwards stay as they are; attention has more keys."""

    retrieves = True

    def check(self, turn: Turn, options: GenerateOptions) -> None:
        """Refuse options that memories or redone steps cannot be combined with."""
        refuse_weights_of_drafts(options)
        if turn.config.uncertainty is not None:
            check_can_redo(options)

    def begin(self, turn: Turn, forward: Forward) -> Forward:
        """Return the forward as it is."""
        return forward

    def attend(self, turn: Turn, call: AttentionCall) -> Attended:
        """Attend to each query's own memories and to the local context, in one softmax."""
        needs_weights = turn.needs_weights(call)
        if call.layer_idx not in turn.layers:
            output, weights = with_local_weights(call) if needs_weights else call.compute()
            return Attended(output, None, weights)
        return attend_to_memories(
            call,
            self._search(turn, len(call.query)),
            turn.config,
            is_recorded=turn.is_recorded,
            needs_weights=needs_weights,
        )

    def _search(self, turn: Turn, batch: int) -> MemorySearch:
        """Return where the queries of this forward search: the same for all layers."""
        search = turn.state.get(self)
        if search is None:
            search = MemorySearch(turn.backend, turn.config, turn.scopes, batch)
            turn.state[self] = search
        return search

    def end(self, turn: Turn, output: Any) -> None:
        """Do nothing: single memories leave no trace in a cache."""

    def heads_to_index(self, config: MemoryConfig, backend: MemoryBackend) -> None:
        """Return None: every head of a reading layer searches."""
