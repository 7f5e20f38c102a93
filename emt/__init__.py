"""Give any Hugging Face causal language model a memory of millions of tokens, with no training."""

from emt.attention import memory_attention
from emt.config import MemoryConfig
from emt.integration import attach, detach
from emt.memory import Memory
from memory_backends import MemoryBackend

__all__ = [
    "Memory",
    "MemoryBackend",
    "MemoryConfig",
    "attach",
    "detach",
    "memory_attention",
]
