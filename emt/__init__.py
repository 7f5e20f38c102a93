"""Give any Hugging Face causal language model a memory of millions of tokens, with no training."""

from emt.attach import attach, detach
from emt.attention.softmax import memory_attention
from emt.citations.passages import cite_passages
from emt.config import MemoryConfig
from emt.memory.memory import Memory
from emt.passage import Passage, RoutedPassage
from emt.published import (
    ExtendedLlamaForCausalLM,
    ExtendedMindForCausalLM,
    ExtendedMptForCausalLM,
)
from emt.routing.head_profile import HeadProfile
from memory_backends import MemoryBackend

__all__ = [
    "ExtendedLlamaForCausalLM",
    "ExtendedMindForCausalLM",
    "ExtendedMptForCausalLM",
    "HeadProfile",
    "Memory",
    "MemoryBackend",
    "MemoryConfig",
    "Passage",
    "RoutedPassage",
    "attach",
    "cite_passages",
    "detach",
    "memory_attention",
]
