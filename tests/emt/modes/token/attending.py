"""One attention call over the memories of a backend."""

from __future__ import annotations

from typing import Any

from emt import MemoryConfig
from emt.model.attention_call import AttentionCall
from emt.modes.token.attend import attend_to_memories
from emt.modes.token.search import MemorySearch
from emt.turn import Attended
from memory_backends import MemoryBackend


def attend(
    call: AttentionCall,
    backend: MemoryBackend,
    config: MemoryConfig,
    scope: Any = None,
    heads: Any = None,
    **options: Any,
) -> Attended:
    """Attend to memories, as token mode does."""
    search = MemorySearch(backend, config, scope, len(call.query), heads)
    return attend_to_memories(call, search, config, **options)
