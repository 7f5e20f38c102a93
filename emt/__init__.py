"""Give any Hugging Face causal language model a memory of millions of tokens, with no training."""

from emt.attention import memory_attention
from emt.config import MemoryConfig
from emt.integration import attach, detach
from emt.memory import Memory
from emt.modeling import (
    ExtendedLlamaForCausalLM,
    ExtendedMindForCausalLM,
    ExtendedMptForCausalLM,
)
from emt.passage_citations import cite_passages
from emt.recall_rows import Passage
from emt.routing import HeadProfile, RoutedPassage
from emt.routing.profiling import profile_heads
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
    "profile_heads",
]
