"""Servers that tests share."""

import pytest

from tests.emt.serving.site import open_site


@pytest.fixture
def site(tmp_path):
    """A server with keys of several scopes, and a store without documents."""
    with open_site(tmp_path) as site:
        yield site
