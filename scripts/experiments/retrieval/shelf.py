"""The documents that questions are asked about: read once, remembered by many conditions."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from emt.attach import attach, detach
from emt.config import MemoryConfig
from emt.memory.memory import Memory
from experiments.rag import Chunks
from experiments.responder import LocalModel, Responder

_WRITING = (
    "remove_special_ids",
    "special_ids",
    "stride",
    "max_length",
    "carry_context",
    "row_codec",
)


class Shelf:
    """Some documents, the stores of their memories and their chunks.

    Both backends read the same store, so conditions that differ only in how they search share it.

    Args:
        documents: (name, text) pairs.
        folder: where stores are kept; one that is there already is brought up to date.
        responder: the model whose tokens make a chunk.
        chunk_tokens: length of a chunk.
        retriever: ranks chunks.

    Attributes:
        seconds: what it took to make the memory of the last `remembered`: to read the documents,
            and to index their rows. Less where a store was there before this process.
    """

    def __init__(
        self,
        documents: Sequence[tuple[str, str]],
        folder: Path,
        responder: Responder,
        *,
        chunk_tokens: int = 500,
        retriever: str = "bm25",
    ) -> None:
        self.documents = list(documents)
        self.folder = folder
        self.seconds = 0.0
        self._responder = responder
        self._chunk_tokens = chunk_tokens
        self._retriever = retriever
        self._made: dict[Path, float] = {}

    @functools.cached_property
    def chunks(self) -> Chunks:
        """All documents in chunks."""
        texts = (text for _, text in self.documents)
        return Chunks(texts, self._responder, self._chunk_tokens, self._retriever)

    @contextlib.contextmanager
    def remembered(self, responder: LocalModel, config: MemoryConfig) -> Iterator[Memory]:
        """Attach a memory of all documents for a block; they are read if they were not yet."""
        path = self.folder / _store_name(config)
        model = responder.model
        memory = attach(model, config.replace(path=str(path)), tokenizer=responder.tokenizer)
        try:
            started = time.perf_counter()
            if path not in self._made:
                with tqdm(desc="reading", unit="tok", disable=None, leave=False) as bar:
                    memory.write_all(self.documents, on_rows=bar.update)
                self._made[path] = self.seconds = time.perf_counter() - started
            else:
                if config.memory_type == "vector_db":
                    memory.save()  # its index of rows that another condition wrote
                self.seconds = self._made[path] + time.perf_counter() - started
            yield memory
        finally:
            detach(model)
            memory.close()


def _store_name(config: MemoryConfig) -> str:
    """Name a store after all settings that change its rows."""
    values = config.to_dict()
    written = {name: values[name] for name in _WRITING}
    return hashlib.sha256(json.dumps(written).encode()).hexdigest()[:12]
