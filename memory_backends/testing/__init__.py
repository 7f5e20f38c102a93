"""The suite of tests that every backend passes, for pytest. A searcher is tested by five lines:

from memory_backends.testing import BackendConformance

class TestMine(BackendConformance):
    memory_type = "mine"
    options = {"some": "option"}
"""

import pytest

for _module in ("checks", "changing", "scopes", "searching"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")  # before they are imported

from memory_backends.testing.conformance import BackendConformance  # noqa: E402

__all__ = ["BackendConformance"]
