"""lm-evaluation-harness's model of transformers, with a memory."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from emt.attach import attach, memory_of
from emt.cli.session import existing
from emt.config import MemoryConfig
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.model.loading import DEFAULT_MODEL, default_model_file
from memory_backends.catalog import Catalog

_SETTINGS = (  # of `MemoryConfig`: those that reading a store goes by; `max_length` is lm_eval's
    "memory_type",
    "enabled",
    "topk",
    "layers",
    "mask_by_sim",
    "sim_threshold",
    "memory_device",
    "sinks",
    "index",
    "search_recall",
    "overfetch",
    "cache_bytes",
)


class ExtendedMindLM(HFLM):
    """A causal language model that reads a memory store while it is evaluated.

    Args:
        pretrained: a folder, hub name, .gguf file, or emt's default model; None for the model that
            wrote the store. From Python also a model, whose memory is used if it has one.
        store: a directory that `emt index` or `Memory.save` wrote, which stays as it is; None for
            the plain model.
        **options: settings of the memory that concern reading (`topk`, `layers`, `memory_type` and
            so on, as in `MemoryConfig`), instead of what the store was written with; all others are
            `HFLM`'s: `dtype`, `device`, `batch_size`, `max_length` ...

    Attributes:
        memory: what is read; None without a store.

    Raises:
        ConfigError: an unknown option, a wrong setting, or a setting without a store.
        StoreError: there is no store, or it is damaged.
        MemoryMismatchError: another model wrote it.
        MemoryUseError: a store is given for a model that has a memory.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        store: str | None = None,
        **options: Any,
    ) -> None:
        settings = {name: options.pop(name) for name in _SETTINGS if name in options}
        _check_names(options)
        config = None
        if store is not None:
            path = existing(str(store))
            with contextlib.closing(Catalog.open(path)) as catalog:
                written = catalog.setting("config") or {}
                pretrained = pretrained or catalog.setting("model")
            defaults = {"memory_type": "vector_db", **written}
            config = MemoryConfig.from_dict({**defaults, **settings, "path": str(path)})
        elif settings:
            raise ConfigError(f"{next(iter(settings))} needs a store. Name one: store=DIRECTORY.")
        if pretrained is None:
            pretrained = DEFAULT_MODEL
        if not isinstance(pretrained, PreTrainedModel):
            pretrained, gguf = _place(str(pretrained))
            options = {**gguf, **options}
        super().__init__(pretrained=pretrained, **options)
        self.memory: Memory | None = memory_of(self.model)
        if config is not None:
            self.memory = attach(self.model, config, tokenizer=self._own_tokenizer)

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        """Keep the tokenizer that a store knows; lm_eval may give its own a token for padding."""
        super()._create_tokenizer(*args, **kwargs)
        self._own_tokenizer = copy.deepcopy(self.tokenizer)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes beside results, with the memory."""
        found: dict[str, Any] = super().get_model_info()
        if self.memory is None:
            return {**found, "memory": None}
        about = {"documents": len(self.memory.documents), "rows": len(self.memory)}
        return {**found, "memory": {**about, **self.memory.config.to_dict()}}


def _place(source: str) -> tuple[str, dict[str, str]]:
    """Return what transformers calls a model, and where in it a .gguf file is."""
    file = default_model_file() if source == DEFAULT_MODEL else Path(source)
    if file.suffix.lower() != ".gguf":
        return source, {}
    if not file.is_file():
        raise ConfigError(f"model file '{file}' does not exist. Correct pretrained.")
    return str(file.parent), {"gguf_file": file.name}


def _check_names(options: dict[str, Any]) -> None:
    """Refuse what is neither an option of `HFLM` nor a setting that is like one of a memory.

    `HFLM` hands names that it does not know to transformers, as it must: only those that are nearly
    a setting, or one that concerns writing, are mistakes for certain.
    """
    known = inspect.signature(HFLM.__init__).parameters
    settings = ("store", *_SETTINGS)
    writing = {name for name in MemoryConfig().to_dict() if name not in settings}
    for name in options:
        if name in known:
            continue
        if name == "path":
            raise ConfigError("a store is named with store=DIRECTORY; got path.")
        if name in writing:
            raise ConfigError(f"{name} concerns writing a store, which is only read here.")
        near = difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
        if near:
            raise ConfigError(f"unknown option {name!r}. Did you mean '{near[0]}'?")
