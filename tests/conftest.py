"""Every test runs on one thread and from one seed."""

import torch
import pytest


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
