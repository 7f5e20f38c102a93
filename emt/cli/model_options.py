"""The options of every subcommand with a model, and the model that they name."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from emt.cli.printing import say
from emt.config import MODEL_SETTINGS, ModelConfig
from emt.model.loading import DEFAULT_MODEL, LoadedModel, load


def add_model_options(
    parser: argparse.ArgumentParser, *, default: str = "the store's, or SmolLM2-135M"
) -> None:
    """Add `--model` and how to load it; `default` says in words which model it is without."""
    dtypes = MODEL_SETTINGS["dtype"]
    parser.add_argument(
        "--model", help=f"a folder, a hub name or a .gguf file (default: {default})"
    )
    parser.add_argument("--device", help="where the model runs: cpu, cuda:0 (default: cpu)")
    parser.add_argument(
        "--dtype", help=f"of its weights: {dtypes.expected} (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="sdpa, eager or another that transformers knows (default: transformers' choice)",
    )


def load_model(options: argparse.Namespace, stored: str | None = None) -> LoadedModel:
    """Load the model of the options, else of their YAML file, else `stored`, else the default.

    Raises:
        ConfigError: a setting of the model is wrong, or what `load` refuses.
    """
    source, how = named_model(options, stored)
    stderr = sys.stderr
    with quiet():
        return load(source, **how, on_message=lambda message: say(message, stderr))


def named_model(
    options: argparse.Namespace, stored: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the model that `load_model` loads, and keywords of `load`; errors as there."""
    config = ModelConfig() if options.config is None else ModelConfig.from_yaml(options.config)
    given = {
        "name": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
    }
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    how = asdict(config)
    return how.pop("name") or stored or DEFAULT_MODEL, how


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of loading a model off the screen, and its progress bars out of a pipe."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
