"""Results of a search, and how candidates are ranked where float32 cannot tell."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from memory_backends.layout import Heads
from memory_backends.scope import Scope

# "exact": right but for the rounding of float32; "half": good to 1e-3; "coarse": a rough guide.
Precision = Literal["exact", "half", "coarse"]

_ROUNDING = 1e-6  # of a float32 cosine, with room to spare
_TINY = 1e-300


class Search(NamedTuple):
    """What `MemoryBackend.search` is asked, as `search_many` takes several."""

    layer_idx: int
    queries: torch.Tensor  # (Hkv, N, head_dim), or (len(heads), N, head_dim)
    k: int
    heads: Heads = None
    scope: Scope | None = None


class SearchResult(NamedTuple):
    """The rows that a search returns.

    Attributes:
        scores: (Hkv, N, k) float32 cosine similarities, best first; -inf where there is nothing.
        ids: (Hkv, N, k) int64 row ids; -1 where there is nothing.
    """

    scores: torch.Tensor
    ids: torch.Tensor


class Retrieval(NamedTuple):
    """The rows that a search returns, with their keys and values, in the layout's dtype."""

    scores: torch.Tensor  # as in `SearchResult`
    ids: torch.Tensor
    keys: torch.Tensor  # (Hkv, N, k, head_dim); any finite numbers where there is none
    values: torch.Tensor  # (Hkv, N, k, value_head_dim)


def tied_queries(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the queries whose k best rows rounding may have chosen or ordered wrongly.

    Scores are (Hkv, N, c) float32 cosines, best first. Returns indexes into N, ascending; a query
    counts if it is tied for any head.
    """
    is_near = (scores[..., :-1] - scores[..., 1:])[..., :k] < _ROUNDING
    return is_near.any(dim=-1).any(dim=0).nonzero().squeeze(1)


def ranked(queries: torch.Tensor, keys: torch.Tensor, ids: torch.Tensor) -> SearchResult:
    """Rank candidates by their exact cosine in float64; equal ones stay in the order they have.

    For queries (Hkv, N, D), of keys (Hkv, N, c, D) with ids (Hkv, N, c); -1 is ranked last.
    """
    scores = cosines(queries, keys, ids)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    return SearchResult(scores.float(), ids.gather(-1, order))


def cosines(queries: torch.Tensor, keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return float64 cosines (Hkv, N, c) of queries and candidates as for `ranked`; -inf for -1."""
    keys = keys.double()
    query = queries.to(keys.device).double().unsqueeze(-1)
    norms = keys.norm(dim=-1) * query.norm(dim=-2)
    scores: torch.Tensor = (keys @ query).squeeze(-1) / norms.clamp(min=_TINY)
    return scores.masked_fill(ids < 0, -torch.inf)
