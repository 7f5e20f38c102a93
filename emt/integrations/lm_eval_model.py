"""lm-evaluation-harness's model of transformers, with a memory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import inspect
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from emt.attach import attach, memory_of
from emt.config import MemoryConfig
from emt.errors import ConfigError, StoreError
from emt.memory.memory import Memory
from emt.model.loading import DEFAULT_MODEL, default_model_file
from memory_backends.catalog import Catalog
from memory_backends.store.directory import check_directory, has_no_store

_HFLM_OPTIONS = frozenset(inspect.signature(HFLM.__init__).parameters)
SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(MemoryConfig)
    if field.name != "path" and field.name not in _HFLM_OPTIONS  # such as `max_length`
)
"""Settings of a memory that can be given as options of the model."""


class ExtendedMindLM(HFLM):
    """A causal language model that reads a memory store while it is evaluated.

    Args:
        pretrained: a folder, hub name, .gguf file, or emt's default model; None for the model that
            wrote the store. From Python also a model, whose memory is used if it has one.
        store: a directory that `emt index` or `Memory.save` wrote, which stays as it is; None for
            the plain model.
        **options: settings of the memory, as in `MemoryConfig` (`mode`, `topk`, `routing` and so
            on), instead of what the store was written with; all others are `HFLM`'s: `dtype`,
            `device`, `batch_size`, `max_length` ...

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
        settings = {name: options.pop(name) for name in SETTINGS if name in options}
        _check_names(options)
        config = None
        if store is not None:
            written, writer = _written(Path(str(store)))
            pretrained = pretrained or writer
            config = MemoryConfig.from_dict({**written, **settings, "path": str(store)})
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
        """Keep the tokenizer as a store compares it; lm_eval may add a token for padding."""
        super()._create_tokenizer(*args, **kwargs)
        self._own_tokenizer = copy.deepcopy(self.tokenizer)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes beside results, with the memory."""
        info: dict[str, Any] = super().get_model_info()
        if self.memory is None:
            return {**info, "memory": None}
        about = {"documents": len(self.memory.documents), "rows": len(self.memory)}
        return {**info, "memory": {**about, **self.memory.config.to_dict()}}


def _written(store: Path) -> tuple[dict[str, Any], str | None]:
    """Return the settings a store was written with, and its model if it was named."""
    if has_no_store(check_directory(store)):
        raise StoreError(f"expected a store at '{store}'; there is none. Correct the path.")
    with contextlib.closing(Catalog.open(store)) as catalog:
        written = {"memory_type": "vector_db", **(catalog.setting("config") or {})}
        return written, catalog.setting("model")


def _place(source: str) -> tuple[str, dict[str, str]]:
    """Return what transformers calls a model, and where in it a .gguf file is."""
    file = default_model_file() if source == DEFAULT_MODEL else Path(source)
    if file.suffix.lower() != ".gguf":
        return source, {}
    if not file.is_file():
        raise ConfigError(f"model file '{file}' does not exist. Correct pretrained.")
    return str(file.parent), {"gguf_file": file.name}


def _check_names(options: dict[str, Any]) -> None:
    """Refuse names that are certainly mistakes; `HFLM` hands others on to transformers."""
    for name in options:
        if name == "path":
            raise ConfigError("a store is named with store=DIRECTORY; got path.")
        near = difflib.get_close_matches(name, ("store", *SETTINGS), n=1, cutoff=0.75)
        if near and name not in _HFLM_OPTIONS:
            raise ConfigError(f"unknown option {name!r}. Did you mean '{near[0]}'?")
