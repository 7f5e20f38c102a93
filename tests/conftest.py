"""Every test runs on one thread and from one seed, and keeps the models that it built.

With pytest-xdist (`pytest -n 2`), a file's tests share a worker, and so do all tests of one real
model, which is then loaded once.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Let fixtures of many tests, which are made before a test's own, compute as tests do."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache directory out of the tests, those in other processes included."""
    os.environ["EMT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _no_head_profile_of_another_test() -> None:
    """Empty the cache of head profiles: many tests, and fixtures, have models of equal weights."""
    shutil.rmtree(Path(os.environ["EMT_CACHE"]) / "profiles", ignore_errors=True)


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the real models, which take longest: no worker waits for another at the end."""
    items.sort(key=lambda item: item.get_closest_marker("model") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hand out whole files, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            if "tests/model/" in file and not file.endswith("test_gemma3.py"):
                return "smollm2"
            return file

    config.option.loadscopereorder = False
    return ByFile(config, log)
