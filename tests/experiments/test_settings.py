from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments.retrieval.settings import RetrievalSettings
from experiments.settings import load_settings

from emt.errors import ConfigError

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "experiments"


@dataclass(frozen=True)
class Trial:
    model: str
    topk: int = 3
    memory: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.topk < 1:
            raise ConfigError("topk must be at least 1.")


BASE = """
model: small
memory: {topk: 4, sinks: one}
presets:
  smoke: {topk: 1}
  full: {model: large, memory: {topk: 9}}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def test_file_preset_and_changes_go_on_top_of_each_other(base):
    assert load_settings(Trial, base) == Trial("small", memory={"topk": 4, "sinks": "one"})
    assert load_settings(Trial, base, preset="full") == Trial("large", memory={"topk": 9})
    found = load_settings(Trial, base, preset="smoke", changes=["topk=7", "memory.topk=2"])
    assert found == Trial("small", 7, {"topk": 2, "sinks": "one"})
    deep = load_settings(Trial, base, changes=["memory={}", "memory.a.b=[1, x]"])
    assert deep.memory == {"a": {"b": [1, "x"]}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "fast"}, "no preset 'fast'. They have smoke, full."),
        ({"changes": ["topkk=3"]}, "unknown key 'topkk'"),
        ({"changes": ["topk"]}, "a change must be key=value; got 'topk'"),
        ({"changes": ["=3"]}, "a change must be key=value; got '=3'"),
        ({"changes": ["topk=[1"]}, "the value of 'topk=[1' is not YAML"),
        ({"changes": ["model.inner=3"]}, "'model' in 'model.inner=3' is not a mapping"),
        ({"changes": ["topk=0"]}, "topk must be at least 1"),
    ],
)
def test_a_wrong_key_preset_or_value_is_refused(base, options, said):
    with pytest.raises(ConfigError) as caught:
        load_settings(Trial, base, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("topk: 3", "missing 1 required positional argument: 'model'"),
        ("- 1", "must be a mapping; got a list"),
        ("a: [", "cannot be read as YAML"),
        ("model: x\npresets: 3", "presets"),
        ("model: x\npresets: {smoke: 3}", "preset 'smoke'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, said):
    path = tmp_path / "trial.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_settings(Trial, path, preset="smoke" if "presets" in content else None)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["retrieval", "many_documents"])
@pytest.mark.parametrize("preset", [None, "smoke", "full"])
def test_the_settings_that_ship_load(name, preset):
    path = CONFIGS / f"{name}.yaml"
    changes = ["items=mine.jsonl"] if preset == "full" else []
    found = load_settings(RetrievalSettings, path, preset=preset, changes=changes)
    assert found.made_conditions()[0].name == "closed_book"
    assert bool(found.sizes) == (name == "many_documents")
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))["presets"]) == {"smoke", "full"}
