"""`PassageMode`: every layer attends to rows of passages, as if their text stood in the prompt.

A source says which passages a forward has. Before the decoder runs, its tokens are moved back by as
many positions as there are rows; each layer then attends to the rows and its local keys with the
model's own attention function. The cache holds the prompt and the answer, nothing else, and
remembers its passages: `generate` runs unchanged, and the rows are read and turned once.

Source: the rows are those of Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332). Keys
stored without their rotation and turned to a place in the prompt: Xiao et al., Efficient Streaming
Language Models with Attention Sinks (arXiv 2309.17453), and Liu et al., ReAttention (2407.15176).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from emt.calls import GenerateOptions
from emt.config import MemoryConfig
from emt.errors import MemoryUseError
from emt.model.attached import AttachedModel
from emt.model.attention_call import AttentionCall
from emt.model.forward import Forward
from emt.modes.guard import refuse_weights_of_drafts
from emt.modes.passage.attend import joined, shares_of_rows
from emt.modes.passage.frame import Frame
from emt.modes.passage.reach import Reach, reach_of
from emt.modes.passage.rows import check_end
from emt.modes.passage.sources import PassageSource
from emt.modes.passage.state import PassageState, state_of
from emt.turn import Attended, Mode, Turn
from memory_backends import MemoryBackend


class _Placed(NamedTuple):
    """The passages of one forward, where its tokens stand, and what its cache will hold."""

    state: PassageState
    frame: Frame
    tokens: Tensor | None


class PassageMode:
    """Recalls passages into prompts.

    Args:
        model: the model.
        source: which passages a forward has.
        inner: the mode that attends to single memories beside the rows; None for the layer's own
            attention.
    """

    def __init__(
        self, model: AttachedModel, source: PassageSource, inner: Mode | None = None
    ) -> None:
        self._model = model
        self._source = source
        self._inner = inner
        self._reaches: dict[int, Reach] = {}  # of each layer

    @property
    def retrieves(self) -> bool:
        """Whether queries retrieve single memories, too."""
        return self._inner is not None

    def check(self, turn: Turn, options: GenerateOptions) -> None:
        """Refuse options that passages, or the inner mode, cannot be combined with."""
        refuse_weights_of_drafts(options)
        self._source.check(turn, options)
        if self._inner is not None:
            self._inner.check(turn, options)

    def begin(self, turn: Turn, forward: Forward) -> Forward:
        """Move the tokens of a forward behind the rows of its passages.

        Raises:
            MemoryUseError: the model is in training mode, its cache was filled without the rows, or
                the batch does not fit the prompts that have passages.
            ConfigError: tokens would stand beyond the model's positions.
            UnsupportedModelError: it cannot be told where tokens stand.
        """
        state = self._source.passages_of(turn, forward)
        if state is None:
            return forward
        if forward.decoder.training:  # layers that are run again for their gradients have no rows
            raise MemoryUseError(
                "passages are recalled in evaluation mode; the model is in training mode. Call "
                "model.eval()."
            )
        frame = Frame.of(state.rows, forward)
        longest = self._model.angles.longest
        if longest is not None and frame.end > longest:
            check_end(int(frame.positions.max()) + 1, longest)
        cached = state_of(forward)
        if forward.tokens.num_past:
            _check_cache(cached, state, frame)
        tokens = (cached or state).all_tokens(forward)
        turn.state[self] = _Placed(state, frame, tokens)
        for recording in turn.recordings:
            recording.recall(state.passages)
        return frame.moved(forward)

    def attend(self, turn: Turn, call: AttentionCall) -> Attended:
        """Attend to the rows and to the local context, and to single memories if there are any."""
        placed: _Placed | None = turn.state.get(self)
        if placed is not None:
            call = placed.frame.place(call, self._reach(call))
        if self._inner is not None and any(turn.num_searchable):
            attended = self._inner.attend(turn, call)
        else:
            output, weights = call.compute()
            attended = Attended(output, None, weights)
        if placed is None or not turn.is_recorded:
            return attended
        first = turn.first_recorded(call.query.shape[2])
        rows = shares_of_rows(call, placed.state.rows, first)
        return attended._replace(retrieved=joined(attended.retrieved, rows, first))

    def _reach(self, call: AttentionCall) -> Reach:
        reach = self._reaches.get(call.layer_idx)
        if reach is None:
            reach = self._reaches[call.layer_idx] = reach_of(self._model.config, call)
        return reach

    def end(self, turn: Turn, output: Any) -> None:
        """Let the caches in what the decoder returned remember their passages."""
        placed: _Placed | None = turn.state.get(self)
        if placed is not None and placed.frame.num_tokens > int(placed.state.rows.at.min()):
            placed.state.keep(output, placed.tokens)

    def heads_to_index(
        self, config: MemoryConfig, backend: MemoryBackend
    ) -> Mapping[int, Sequence[int]] | None:
        """Return the KV heads that the source searches, by layer; None for all."""
        return self._source.heads_to_index(config, backend)


def _check_cache(cached: PassageState | None, state: PassageState, frame: Frame) -> None:
    """Refuse a cache with keys that were computed without these rows, or with others."""
    if cached is not None and cached.origin is state.origin:
        return
    first = frame.index[:, :1]
    if cached is None and not bool((first > frame.first_place).any()):
        return
    raise MemoryUseError(
        f"passages are put before token {int(frame.first_place.min())} of the prompt, and the "
        "cache holds tokens from there on that were computed without them. Begin with an empty "
        "cache inside this recalling() block, or put the passages after what is cached: at="
        f"{int(first.max())}."
    )
