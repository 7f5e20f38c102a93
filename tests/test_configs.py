"""The configurations that ship: they load, and two of them document every setting."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from emt import MemoryConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.y*ml"))
REFERENCES = [path for path in CONFIGS if path.stem in ("vector_db", "manual")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_loads(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert MemoryConfig.from_yaml(path) == MemoryConfig(**values)


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.name)
def test_the_references_name_every_key_with_its_default_and_explain_it(path):
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert list(values) == [field.name for field in dataclasses.fields(MemoryConfig)]
    assert values == {**MemoryConfig().to_dict(), "memory_type": path.stem}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            assert " # " in line, f"{path.name}: {line}"


def test_the_references_differ_in_memory_type_only():
    assert [path.stem for path in REFERENCES] == ["manual", "vector_db"]
    one, other = (MemoryConfig.from_yaml(path) for path in REFERENCES)
    assert one == other.replace(memory_type=one.memory_type)
