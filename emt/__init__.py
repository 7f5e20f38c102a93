"""Give any Hugging Face causal language model a memory of millions of tokens, with no training."""

from emt.attach import attach, detach
from emt.attention.softmax import memory_attention
from emt.citations.citing import Citation, RowCitation
from emt.citations.recording import Recording
from emt.config import MemoryConfig
from emt.errors import (
    ConfigError,
    CorpusError,
    DocumentError,
    EMTError,
    IndexFactoryError,
    MemoryMismatchError,
    MemoryUseError,
    StoreError,
    UnsupportedModelError,
)
from emt.memory.memory import Memory
from emt.passage import Passage, Routed, RoutedPassage
from emt.published import (
    ExtendedLlamaForCausalLM,
    ExtendedMindForCausalLM,
    ExtendedMptForCausalLM,
)
from emt.routing.head_profile import HeadProfile
from memory_backends import MemoryBackend

__all__ = [
    "Citation",
    "ConfigError",
    "CorpusError",
    "DocumentError",
    "EMTError",
    "ExtendedLlamaForCausalLM",
    "ExtendedMindForCausalLM",
    "ExtendedMptForCausalLM",
    "HeadProfile",
    "IndexFactoryError",
    "Memory",
    "MemoryBackend",
    "MemoryConfig",
    "MemoryMismatchError",
    "MemoryUseError",
    "Passage",
    "Recording",
    "Routed",
    "RoutedPassage",
    "RowCitation",
    "StoreError",
    "UnsupportedModelError",
    "attach",
    "detach",
    "memory_attention",
]
