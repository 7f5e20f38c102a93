import itertools
from typing import Any

import pytest
import yaml
from experiments.builder.settings import BuildSettings
from experiments.registry import experiment_of
from experiments.settings import Ascending, MemorySettings, Settings, read_settings
from pydantic import PositiveInt

from emt.errors import ConfigError
from tests.emt.commands import ROOT

CONFIGS = ROOT / "configs" / "experiments"
NAMES = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - {"build_items"})


class Trial(Settings):
    model: str
    topk: PositiveInt = 3
    sizes: Ascending = [1, 2]
    memory: MemorySettings = {}
    extra: dict[str, Any] = {}


BASE = """
model: small
extra: {topk: 4, sinks: one}
presets:
  smoke: {topk: 1}
  full: {model: large, extra: {topk: 9}}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def test_file_preset_and_changes_go_on_top_of_each_other(base):
    plain = Trial(**read_settings(base))
    assert (plain.model, plain.topk, plain.extra) == ("small", 3, {"topk": 4, "sinks": "one"})
    full = Trial(**read_settings(base, preset="full"))
    assert (full.model, full.extra) == ("large", {"topk": 9})
    values = read_settings(base, preset="smoke", changes=["topk=7", "extra.topk=2"])
    assert values == {"model": "small", "topk": 7, "extra": {"topk": 2, "sinks": "one"}}
    deep = read_settings(base, changes=["extra={}", "extra.a.b=[1, x]"])
    assert deep["extra"] == {"a": {"b": [1, "x"]}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "fast"}, "no preset 'fast'. They have smoke, full."),
        ({"changes": ["topk"]}, "a change must be key=value; got 'topk'"),
        ({"changes": ["=3"]}, "a change must be key=value; got '=3'"),
        ({"changes": ["topk=[1"]}, "the value of 'topk=[1' is not YAML"),
        ({"changes": ["model.inner=3"]}, "'model' in 'model.inner=3' is not a mapping"),
    ],
)
def test_a_wrong_preset_or_change_is_refused(base, options, said):
    with pytest.raises(ConfigError) as caught:
        read_settings(base, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", ["- 1", "a: [", "3"])
def test_a_wrong_file_is_refused(tmp_path, content):
    path = tmp_path / "trial.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"must be a mapping|cannot be read as YAML"):
        read_settings(path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "model: Field required"),
        ({"model": 5}, "model: Input should be a valid string; got 5"),
        ({"model": "m", "topk": 0}, "topk: Input should be greater than 0; got 0"),
        ({"model": "m", "topk": True}, "topk: Input should be a valid integer; got True"),
        ({"model": "m", "topkk": 2}, "unknown setting 'topkk'. Did you mean 'topk'?"),
        ({"model": "m", "x": 2}, "unknown setting 'x'. The settings are model, topk, sizes"),
        ({"model": "m", "sizes": [2, 1]}, "sizes: expected ascending numbers; got [2, 1]"),
        ({"model": "m", "sizes": 2}, "sizes: Input should be a valid list; got 2"),
        ({"model": "m", "memory": {"path": "x"}}, "memory: 'path' cannot be set"),
        ({"model": "m", "memory": {"topkk": 3}}, "Did you mean 'topk'"),
        ({"model": 5, "topk": "x"}, "; topk: Input should be a valid integer"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, said):
    with pytest.raises(ConfigError) as caught:
        Trial(**values)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_that_ship_load_and_name_every_setting(name):
    path = CONFIGS / f"{name}.yaml"
    presets = yaml.safe_load(path.read_text(encoding="utf-8")).get("presets", {})
    assert set(presets) == {"smoke", "full"}
    given = ["items=x.jsonl"] if name in ("interpretability", "retrieval") else []
    given = ["embedding_model=x"] if name == "comparison" else given
    for preset in (None, *presets):
        values = read_settings(path, preset=preset, changes=given)
        experiment = experiment_of(values.pop("experiment"))
        experiment.settings(**values)
    if name in (experiment.settings.__module__.split(".")[1], "build_items"):
        assert set(values) == set(experiment.settings.model_fields)


def test_the_builder_s_settings_that_ship_load():
    path = CONFIGS / "build_items.yaml"
    for preset, seed in itertools.product((None, "smoke"), (0, 3)):
        settings = BuildSettings(**read_settings(path, preset=preset, changes=[f"seed={seed}"]))
        assert settings.seed == seed
    with pytest.raises(ConfigError, match=r"splits\.2k: expected \[lowest, highest\] in tokens"):
        BuildSettings(**read_settings(path, changes=["splits={2k: [9, 3]}"]))
    with pytest.raises(ConfigError, match="experiment must be one of comparison, retrieval"):
        experiment_of("build_items")
