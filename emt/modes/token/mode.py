"""`TokenMode`: at every layer and head, each query attends to the memories nearest to it.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emt.calls import GenerateOptions
from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.model.attached import AttachedModel
from emt.model.attention_call import AttentionCall
from emt.model.forward import Forward
from emt.modes.guard import refuse_weights_of_drafts
from emt.modes.token.attend import attend_to_memories, with_local_weights
from emt.modes.token.redo import check_can_redo
from emt.modes.token.search import MemorySearch
from emt.profiles.choice import ProfileChoice
from emt.turn import Attended, Turn
from memory_backends import MemoryBackend


class TokenMode:
    """The published method. Forwards stay as they are; attention has more keys."""

    retrieves = True

    def __init__(self, model: AttachedModel, profiles: ProfileChoice) -> None:
        self._model = model
        self._profiles = profiles

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
        is_reading = call.layer_idx in turn.layers
        search = self._search(turn, len(call.query)) if is_reading else None
        if search is None or not search.searches_in(call.layer_idx):
            output, weights = with_local_weights(call) if needs_weights else call.compute()
            return Attended(output, None, weights)
        return attend_to_memories(
            call,
            search,
            turn.config,
            is_recorded=turn.is_recorded,
            needs_weights=needs_weights,
        )

    def _search(self, turn: Turn, batch: int) -> MemorySearch:
        """Return where the queries of this forward search: the same for all layers."""
        search = turn.state.get(self)
        if search is None:
            heads = self._heads(turn.config, turn.backend)
            search = MemorySearch(turn.backend, turn.config, turn.scopes, batch, heads)
            turn.state[self] = search
        return search

    def end(self, turn: Turn, output: Any) -> None:
        """Do nothing: single memories leave no trace in a cache."""

    def heads_to_index(
        self, config: MemoryConfig, backend: MemoryBackend
    ) -> Mapping[int, Sequence[int]] | None:
        """Return the KV heads of the query heads that search; None if all do.

        Raises:
            ConfigError: no head of the profile is in the layers that are to read memories.
        """
        heads = self._heads(config, backend)
        if heads is None:
            return None
        kv_heads = {}
        for idx, of_layer in heads.items():
            group = self._model.query_heads[idx] // backend.layout.layers[idx].num_key_value_heads
            kv_heads[idx] = sorted({head // group for head in of_layer})
        return kv_heads

    def _heads(
        self, config: MemoryConfig, backend: MemoryBackend
    ) -> Mapping[int, Sequence[int]] | None:
        """Return the query heads that search, by layer; None for all of the reading layers."""
        profile = self._profiles.find(config, backend) if config.heads == "profile" else None
        if profile is None:
            return None
        heads: dict[int, list[int]] = {}
        for head in profile.heads:
            if config.layers is None or head.layer in config.layers:
                heads.setdefault(head.layer, []).append(head.head)
        if not heads:
            raise ConfigError(
                f"the head profile must have heads in the layers {list(config.layers or ())}; it "
                f"has some in {list(profile.layers)}. Set layers to some of these, or heads to "
                "'all'."
            )
        return heads
