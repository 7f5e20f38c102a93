"""The published interface: models that are given their memories as token ids."""

from emt.published.configuration import ExtendedLlamaConfig, ExtendedMptConfig
from emt.published.models import (
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
