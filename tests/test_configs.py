"""The configurations that ship: they load, two document every setting, one is the published."""

from pathlib import Path

import pytest
import yaml
from write_configs import TITLES, text_of

from emt import MemoryConfig
from emt.config import PUBLISHED_METHOD

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.y*ml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_loads(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert MemoryConfig.from_yaml(path) == MemoryConfig.from_dict(values)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_is_commented(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.strip() and not line.lstrip().startswith("#") and not line.endswith(":"):
            assert before.lstrip().startswith("#") or " # " in line, line


@pytest.mark.parametrize("name", TITLES)
def test_the_references_are_as_the_settings_are_declared(name):
    (path,) = (path for path in CONFIGS if path.stem == name)
    assert path.read_text(encoding="utf-8") == text_of(name), "run python scripts/write_configs.py"
    settings = PUBLISHED_METHOD if name == "published" else {"memory_type": name}
    assert MemoryConfig.from_yaml(path) == MemoryConfig(**settings)
