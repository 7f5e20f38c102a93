import pytest

from tests.emt.published.extended import llama


@pytest.fixture
def model():
    return llama()
