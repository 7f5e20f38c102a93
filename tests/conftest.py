"""Every test runs on one thread and from one seed, and keeps the models that it built."""

import sys
from collections.abc import Iterator

import torch
import pytest


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _models_live_as_long_as_their_test() -> Iterator[None]:
    yield
    families = sys.modules.get("tests.families")
    if families is not None:
        families.let_go_of_models()
