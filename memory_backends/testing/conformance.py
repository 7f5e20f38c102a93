"""All parts of the suite in one class."""

from __future__ import annotations

from memory_backends.testing.changing import ChangeConformance
from memory_backends.testing.scopes import ScopeConformance
from memory_backends.testing.searching import SearchConformance


class BackendConformance(SearchConformance, ChangeConformance, ScopeConformance):
    """What every backend must do. Inherit, and set `memory_type`; see `Suite` for more."""
