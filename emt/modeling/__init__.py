"""The published interface: models that are given their memories as token ids."""

from emt.modeling.configuration import ExtendedLlamaConfig, ExtendedMptConfig
from emt.modeling.models import (
    ExtendedLlamaForCausalLM,
    ExtendedMindForCausalLM,
    ExtendedMptForCausalLM,
)

__all__ = [
    "ExtendedLlamaConfig",
    "ExtendedLlamaForCausalLM",
    "ExtendedMindForCausalLM",
    "ExtendedMptConfig",
    "ExtendedMptForCausalLM",
]
