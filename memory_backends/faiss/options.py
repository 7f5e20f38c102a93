"""The options of `memory_type="vector_db"`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FaissOptions:
    """How a memory is indexed, and what of it is kept in RAM or on a GPU.

    Attributes:
        index: "auto" (exact while small, then IVF) or a FAISS factory string.
        recall: share of the attention to the exact nearest rows that the search of a plain IVF
            index must find, if enough queries were sampled; see `calibration.py`.
        overfetch: for coarse codes, candidates for each row asked for, ranked by their exact keys.
        cache_bytes: bytes of RAM for FAISS files and mapped rows; None for no limit. IVF indexes
            that take more than half of it stay mapped. Other kinds of index, and rows added since
            the last `save`, are in RAM in any case. The limit can be exceeded until 1,024 more
            rows were read.
        index_files: False leaves the store's FAISS files unread, as if there were none.
        indexed_layers: the layers that `save` writes FAISS files for; None for all. Other layers
            can be searched too, with an index made in RAM.
        indexed_heads: layer -> the KV heads that `save` writes FAISS files for, in place of all
            heads of `indexed_layers`. Files of other heads stay until there is something to write.
            Other heads can be searched too, with an index made in RAM.
        device: a GPU, such as "cuda:0", for copies of as many indexed layers as fit; None or "cpu"
            for none.
    """

    index: str = "auto"
    recall: float = 0.95
    overfetch: int = 4
    cache_bytes: int | None = None
    index_files: bool = True
    indexed_layers: Iterable[int] | None = None
    indexed_heads: Mapping[int, Sequence[int]] | None = None
    device: torch.device | str | None = None
