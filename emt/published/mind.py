"""`ExtendedMind`: what makes a stock model one that is given its memories as token ids."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from emt.attach import attach, generating, memory_of
from emt.calls import overrides_of, overriding
from emt.citations.recording import Recording
from emt.errors import ConfigError
from emt.ingest.documents import Source, to_document
from emt.memory.memory import Memory
from emt.model.watch import watcher
from emt.passage import Step
from emt.published.indices import LayerIndices, memory_indices
from emt.published.settings import absolute, memory_config
from memory_backends import StoredDocument

DOCUMENT = "external_memories"  # the name that memory_ids are stored under

_CALL_OPTIONS = ("topk", "use_external_mind", "output_retrieved_memory_idx")
_making = threading.RLock()  # of two threads' first calls, one attaches and reads


class ExtendedMind(PreTrainedModel):
    """A causal language model with memories; comes before the stock class among a class's bases.

    The memory is attached, and `memory_ids` are read, by the first `forward` or `generate`.

    Args:
        config: the stock model's, or an extended one; its `memory_config` has the memory settings.
        external_memories: token ids to remember; see `memory_ids`.
        **settings: memory settings under their published names, or those of `MemoryConfig`, which
            count more than the config's.

    Attributes:
        memory_settings: the settings of the memory, all of them.

    Raises:
        ConfigError: a setting that is unknown or of a wrong value.

    Source:
        The published implementation, https://github.com/normal-computing/extended-mind-transformers
    """

    guards_generate = True  # itself: `attach` need not, and could not write before it closes

    def __init__(
        self, config: PreTrainedConfig, external_memories: Source | None = None, **settings: Any
    ) -> None:
        settings = {**(getattr(config, "memory_config", None) or {}), **absolute(settings)}
        config = copy.copy(config)  # it may be shared with a model of other settings
        config.memory_config = settings
        super().__init__(config)
        self.memory_settings = memory_config(
            settings, self.memory_defaults(config), config.get_text_config()
        )
        self._memory_ids: list[int] | None = None
        self._is_written = False
        if external_memories is not None:
            self.memory_ids = external_memories

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cast(Any, super()).__init_subclass__(**kwargs)
        cls.forward = _with_call_options(cls.forward)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: weights have the stock class's names, and are converted as its are."""
        return False

    @classmethod
    def memory_defaults(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the settings that hold where nothing is said, under their published names."""
        return {}

    @property
    def memory(self) -> Memory:
        """The model's memory, attached when it is first asked for."""
        with _making:
            memory = memory_of(self)
            return attach(self, self.memory_settings) if memory is None else memory

    @property
    def memory_ids(self) -> list[int] | None:
        """The token ids that are remembered, or will be by the next call; None if there are none.

        Assign token ids, (N,) or (1, N), as a list, an array or a tensor: they replace those
        before. Documents that were written to the same store otherwise are left alone.
        """
        if self._memory_ids is None and self.memory_settings.path is not None:
            document = self._document()
            return None if document is None else [int(token) for token in document.token_ids]
        return self._memory_ids

    @memory_ids.setter
    def memory_ids(self, ids: Source | None) -> None:
        if ids is None:
            self.clear_memories()
            return
        vocab_size = self.config.get_text_config().vocab_size
        document = to_document(ids, DOCUMENT, None, vocab_size)
        self._memory_ids = [int(token) for token in document.token_ids]
        self._is_written = False

    def clear_memories(self) -> None:
        """Forget `memory_ids`. Documents that were written to the same store otherwise stay.

        Raises:
            MemoryUseError: while generating.
        """
        if DOCUMENT in self.memory.documents:
            self.memory.remove(DOCUMENT)
        self._memory_ids = None

    clear_memory = clear_memories

    def generate_cache(
        self, input_ids: Source, stride: int | None = None, max_len: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values that token ids (N,) or (1, N) would leave; remember nothing.

        Windows start every `stride` tokens and take `max_len`: by default, as the settings say.

        Returns:
            For each layer keys (1, Hkv, N, D), before RoPE, and values (1, Hkv, N, Dv), in the
            model's dtype. Special ids have theirs, too.

        Raises:
            ConfigError: `max_len` is less than `stride`, or more than the model has positions.
            DocumentError: `input_ids` are not token ids.
        """
        settings = {"stride": stride, "max_length": max_len}
        given = {name: value for name, value in settings.items() if value is not None}
        runs = list(self.memory.read(input_ids, **given))
        return [
            (
                torch.cat([rows.keys[idx] for rows in runs], dim=1)[None],
                torch.cat([rows.values[idx] for rows in runs], dim=1)[None],
            )
            for idx in sorted(runs[0].keys)
        ]

    def _document(self) -> StoredDocument | None:
        """Return what is stored of `memory_ids`."""
        catalog = self.memory.backend.catalog
        return catalog.document(DOCUMENT) if catalog.has_document(DOCUMENT) else None

    def _remember(self) -> Memory:
        """Return the memory, with `memory_ids` in it; a copy of a model has to read them again."""
        with _making:
            memory = self.memory
            catalog = memory.backend.catalog
            is_stored = catalog.has_document(DOCUMENT)
            if self._memory_ids is None or (self._is_written and is_stored):
                return memory
            is_kept, read_as = memory.config.path is not None, memory.encoder.settings
            if is_kept and is_stored and catalog.setting(DOCUMENT) != read_as:
                memory.remove(DOCUMENT)
            memory.write_all([(DOCUMENT, self._memory_ids)])  # nothing, if it is stored
            if is_kept:
                memory.backend.catalog.set_setting(DOCUMENT, read_as)
            self._is_written = True
        return memory

    def generate(
        self,
        *args: Any,
        topk: int | Literal["auto"] | None = None,
        use_external_mind: bool | None = None,
        uncertainty: Mapping[str, Any] | None = None,
        output_retrieved_memory_idx: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate, as every model of transformers, with memories.

        Args:
            *args: as transformers' `generate`, like `kwargs`.
            topk: memories each query attends to in this call; 0 for none.
            use_external_mind: False for the plain model, in this call.
            uncertainty: redo a step whose next-token entropy is above `entropy` with `topk`
                memories; a mapping of these two, as in `MemoryConfig`.
            output_retrieved_memory_idx: return which memories were retrieved; needs
                `return_dict_in_generate`. Then `attentions` of the output has for each forward a
                pair: attention weights or None, and what `memory_indices` gives; and `recording`
                has the citations.

        Raises:
            ConfigError: `topk` is not a whole number, indices are asked for without a dict, or
                `uncertainty` is wrong or with options that it cannot be combined with.
            MemoryUseError: the memory is being changed.
        """
        if output_retrieved_memory_idx and not _returns_dict(self, kwargs):
            raise ConfigError(
                "output_retrieved_memory_idx needs return_dict_in_generate=True. Pass both."
            )
        memory = self._remember()
        if not output_retrieved_memory_idx:
            overridden = _overriding(memory, topk, use_external_mind, (), uncertainty)
            with overridden, generating(self, kwargs) as generation:
                outputs = cast(Any, super()).generate(*args, **kwargs)
                generation.end(outputs)
                return outputs
        recording, whole = memory.new_recording(), memory.new_recording(whole_prompt=True)
        with _overriding(memory, topk, use_external_mind, (recording, whole), uncertainty):
            if memory.new_turn().config.uncertainty is not None:
                raise ConfigError(
                    "output_retrieved_memory_idx cannot be combined with uncertainty, which "
                    "redoes steps. Use memory.recording() instead."
                )
            with generating(self, kwargs) as generation:
                outputs = cast(Any, super()).generate(*args, **kwargs)
                generation.end(outputs)
        # Forwards that attended to no memories are not recorded: those before the others.
        steps: list[Step] = [{}] * (generation.num_forwards - len(whole)) + list(whole)
        indices = [self._indices(step) for step in steps]
        weights = list(outputs.attentions or ())
        # Of a prompt in chunks only the last one's weights are returned.
        weights = [None] * (len(indices) - len(weights)) + weights
        outputs["attentions"] = tuple(zip(weights, indices, strict=True))
        outputs.recording = recording
        return outputs

    def _forward(
        self,
        stock: Callable[..., Any],
        *args: Any,
        topk: int | Literal["auto"] | None = None,
        use_external_mind: bool | None = None,
        output_retrieved_memory_idx: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the stock forward with memories; the options are those of `generate`."""
        if watcher() is not None:  # a decoder that is the whole model is read by `attach`
            return stock(self, *args, **kwargs)
        # Within `generate` the memory is made, and cannot be written to.
        memory = self.memory
        memory = memory if overrides_of(memory).generation is not None else self._remember()
        recordings = (
            [memory.new_recording(whole_prompt=True)] if output_retrieved_memory_idx else []
        )
        needs_weights = bool(kwargs.get("output_attentions"))
        with _overriding(memory, topk, use_external_mind, recordings, needs_weights=needs_weights):
            outputs = stock(self, *args, **kwargs)
        if not recordings:
            return outputs
        indices = self._indices(recordings[0][0] if len(recordings[0]) else {})
        if not isinstance(outputs, ModelOutput):
            raise ConfigError("output_retrieved_memory_idx needs return_dict=True. Pass both.")
        outputs["attentions"] = (outputs.get("attentions"), indices)
        return outputs

    def _indices(self, step: Step) -> LayerIndices:
        document = self._document() or StoredDocument(DOCUMENT, np.empty(0, dtype=np.int32))
        return memory_indices(step, document, self.config.get_text_config().num_hidden_layers)


def _with_call_options(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that takes memory options, too, and says so: `generate` looks."""

    @functools.wraps(stock)
    def forward(self: ExtendedMind, *args: Any, **kwargs: Any) -> Any:
        return self._forward(stock, *args, **kwargs)

    signature = inspect.signature(stock)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _CALL_OPTIONS
        if name not in signature.parameters
    ]
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[at:at] = options
    # torch.compile would trace how memories are made; what it may compile is inside `stock`.
    uncompiled = cast(Callable[..., Any], torch.compiler.disable(forward))
    vars(uncompiled)["__signature__"] = signature.replace(parameters=parameters)
    return uncompiled


def _overriding(
    memory: Memory,
    topk: int | Literal["auto"] | None,
    use_external_mind: bool | None,
    recordings: Sequence[Recording],
    uncertainty: Mapping[str, Any] | None = None,
    *,
    needs_weights: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """Put the options of one call into force, for this thread."""
    settings: dict[str, Any] = {} if uncertainty is None else {"uncertainty": uncertainty}
    if use_external_mind is not None:
        settings["enabled"] = use_external_mind
    if topk is not None and not isinstance(topk, bool) and topk == 0:
        settings["enabled"] = False
    elif topk is not None:
        settings["topk"] = topk
    config = memory.new_turn().config.replace(**settings) if settings else None
    return overriding(memory, config=config, recordings=recordings, needs_weights=needs_weights)


def _returns_dict(model: Any, options: dict[str, Any]) -> bool:
    """Tell whether a `generate` call returns a dict."""
    config = options.get("generation_config") or model.generation_config
    given = options.get("return_dict_in_generate")
    return bool(config.return_dict_in_generate if given is None else given)
