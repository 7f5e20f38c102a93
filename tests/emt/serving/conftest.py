"""A server with keys, for each test a new one."""

import pytest

pytest.importorskip("fastapi")

from tests.emt.serving.site import open_site


@pytest.fixture
def site(tmp_path):
    """A server with keys of several scopes, and a store without documents."""
    with open_site(tmp_path) as site:
        yield site
