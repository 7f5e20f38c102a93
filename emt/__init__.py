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
from emt.recall_rows import Passage
from memory_backends import MemoryBackend

__all__ = [
    "ExtendedLlamaForCausalLM",
    "ExtendedMindForCausalLM",
    "ExtendedMptForCausalLM",
    "Memory",
    "MemoryBackend",
    "MemoryConfig",
    "Passage",
    "attach",
    "detach",
    "memory_attention",
]
