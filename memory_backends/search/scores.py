"""Results of a search, and how candidates are ranked where float32 cannot tell."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

# "exact": right but for the rounding of float32; "half": good to 1e-3; "coarse": a rough guide.
Precision = Literal["exact", "half", "coarse"]

_ROUNDING = 1e-6  # of a float32 cosine, with room to spare
_TINY = 1e-300


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
    keys = keys.double()
    query = queries.to(keys.device).double().unsqueeze(-1)
    norms = keys.norm(dim=-1) * query.norm(dim=-2)
    scores = (keys @ query).squeeze(-1) / norms.clamp(min=_TINY)
    scores = scores.masked_fill(ids < 0, -torch.inf)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    return SearchResult(scores.float(), ids.gather(-1, order))
