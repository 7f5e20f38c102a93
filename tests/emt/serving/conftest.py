import pytest


@pytest.fixture
def site(tmp_path):
    from tests.emt.serving.site import open_site

    with open_site(tmp_path) as site:
        yield site
