"""Does emt work with a family? Build it tiny, attach, and ask the oracle."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

import emt
from emt.errors import ConfigError, EMTError
from tests.forgetting import forget_and_remember
from tests.tiny_exceptions import NOT_BUILT
from tests.tiny_models import VOCAB_SIZE, build_tiny

TOLERANCE = 2e-5
LEAST_EFFECT = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What became of one family.

    Attributes:
        family: the model type.
        outcome: "works", "refused", "not built", or "wrong": attached, and not as it should be.
        detail: the first line of the refusal, or why it was not built or is wrong.
        error: what the oracle found, if it was asked.
        effect: how much the memory changed, if so.
    """

    family: str
    outcome: str
    detail: str = ""
    error: float | None = None
    effect: float | None = None


def verdict_on(family: str) -> Verdict:
    """Build, attach, ask the oracle; never raise."""
    torch.set_num_threads(1)
    if family in NOT_BUILT:
        return Verdict(family, "not built", NOT_BUILT[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build_tiny(family)
        except Exception as error:
            return Verdict(family, "not built", _first_line(error))
        try:
            memory = _attached(model)
        except EMTError as error:
            return Verdict(family, "refused", str(error).splitlines()[0])
        except Exception as error:
            return Verdict(family, "wrong", f"attach: {_first_line(error)}")
        try:
            found = forget_and_remember(model, memory, vocab_size=VOCAB_SIZE)
        except Exception as error:
            return Verdict(family, "wrong", f"the oracle: {_first_line(error)}")
    if not found.effect >= LEAST_EFFECT:
        return Verdict(family, "wrong", "the memory changes nothing", *found)
    if not found.error <= TOLERANCE:
        return Verdict(family, "wrong", "the memory is not context", *found)
    return Verdict(family, "works", "", *found)


def _attached(model: PreTrainedModel) -> emt.Memory:
    """Attach; where all layers have a window, ask for them."""
    try:
        return emt.attach(model, emt.MemoryConfig(memory_type="manual"))
    except ConfigError:
        config = model.config.get_text_config()
        types = getattr(config, "layer_types", ["sliding_attention"] * config.num_hidden_layers)
        layers = [idx for idx, kind in enumerate(types) if "linear" not in kind]
        return emt.attach(model, emt.MemoryConfig(memory_type="manual", layers=layers))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
