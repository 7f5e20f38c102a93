import dataclasses

import pytest
import yaml

from emt import MemoryConfig
from emt.errors import ConfigError

CHANGED = {
    "memory_type": "vector_db",
    "path": "memories/",
    "enabled": False,
    "mode": "passage",
    "recall_rows": 96,
    "recall_passages": 2,
    "routing": "both",
    "relevance": -1.5,
    "reroute": 16,
    "profile": "heads.json",
    "topk": 3,
    "uncertainty": {"entropy": 1.0, "topk": 12},
    "layers": (0, 2),
    "mask_by_sim": True,
    "sim_threshold": -0.5,
    "memory_device": "cuda:1",
    "remove_special_ids": False,
    "special_ids": (),
    "stride": 7,
    "max_length": 9,
    "sinks": "one",
    "carry_context": True,
    "row_codec": "int4",
    "index": "IVF64,Flat",
    "recall": 0.9,
    "overfetch": 8,
    "cache_bytes": 2**30,
}
WRONG = {
    "memory_type": ["faiss", None, 1, True, ["manual"]],
    "path": ["", 3, True, ["a"]],
    "enabled": [1, 0, None, "yes"],
    "mode": ["tokens", None, True],
    "recall_rows": [0, -1, 1.5, "9", None, True],
    "recall_passages": [0, 2.0, None, True],
    "routing": ["bm25", None, ["heads"]],
    "relevance": ["0.5", True, float("nan"), float("inf")],
    "reroute": [0, -1, 2.5, "3", True],
    "profile": ["", 3, True],
    "topk": [0, -1, 2.0, "3", None, True],
    "uncertainty": [1.0, True, "1.0", (1.0, 12)],
    "layers": [[], [-1], [1.0], [True], 1, "0", {0: 1}, ["0"]],
    "mask_by_sim": [1, 0, None, "yes"],
    "sim_threshold": [1.01, -1.01, float("nan"), "0.5", None, True],
    "memory_device": ["", "gpu", "cuda:x", 0, True],
    "remove_special_ids": [1, None, "true"],
    "special_ids": [[-1], [1.5], 1, "1", [True]],
    "stride": [0, -512, 1.0, None, "512", False],
    "max_length": [0, -1, 3072.0, None, True],
    "sinks": ["none", None, 4, True],
    "carry_context": [0, "yes"],
    "row_codec": ["int2", "fp16", None],
    "index": ["", None, 5],
    "recall": [0.0, 1.5, "0.9", True],
    "overfetch": [0, 1.5, True],
    "cache_bytes": [0, -1, 1e9, True],
}


def test_defaults_are_the_published_ones():
    assert MemoryConfig().to_dict() == {
        "memory_type": "manual",
        "path": None,
        "enabled": True,
        "mode": "auto",
        "recall_rows": 384,
        "recall_passages": 3,
        "routing": "heads",
        "relevance": 0.5,
        "reroute": None,
        "profile": None,
        "topk": 10,
        "uncertainty": None,
        "layers": None,
        "mask_by_sim": False,
        "sim_threshold": 0.25,
        "memory_device": None,
        "remove_special_ids": True,
        "special_ids": None,
        "stride": 512,
        "max_length": 3072,
        "sinks": "all",
        "carry_context": False,
        "row_codec": "exact",
        "index": "auto",
        "recall": 0.95,
        "overfetch": 4,
        "cache_bytes": None,
    }


def test_every_field_is_tested_here():
    names = [field.name for field in dataclasses.fields(MemoryConfig)]
    assert names == list(CHANGED) == list(WRONG)


@pytest.mark.parametrize("values", [{}, CHANGED], ids=["defaults", "all changed"])
def test_yaml_round_trip(tmp_path, values):
    config = MemoryConfig(**values)
    config.to_yaml(tmp_path / "config.yaml")
    assert MemoryConfig.from_yaml(tmp_path / "config.yaml") == config
    plain = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(plain) == list(CHANGED)
    assert MemoryConfig.from_dict(plain) == config


def test_yaml_keeps_defaults_of_what_it_does_not_name(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("topk: 4\nlayers: [2, 0]\nsim_threshold: 1\n")
    assert MemoryConfig.from_yaml(path) == MemoryConfig(topk=4, layers=(2, 0), sim_threshold=1.0)
    path.write_text("# nothing\n")
    assert MemoryConfig.from_yaml(path) == MemoryConfig()


def test_paths_and_lists_are_normalised(tmp_path):
    config = MemoryConfig(path=tmp_path, layers=[1], special_ids=[0])
    assert (config.path, config.layers, config.special_ids) == (str(tmp_path), (1,), (0,))
    assert hash(config) == hash(MemoryConfig(path=str(tmp_path), layers=(1,), special_ids=(0,)))


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().topk = 3


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="positional"):
        MemoryConfig("manual")


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_values_are_refused_with_expected_and_got(name, value):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig(**{name: value})
    got = tuple(value) if isinstance(value, list) and name in ("layers", "special_ids") else value
    assert str(caught.value).startswith(f"{name} must be ")
    assert str(caught.value).endswith(f"; got {got!r}.")
    assert isinstance(caught.value, ValueError)


def test_windows_must_not_leave_gaps():
    with pytest.raises(ConfigError, match=r"max_length \(511\) must be at least stride \(512\)"):
        MemoryConfig(max_length=511)
    assert MemoryConfig(max_length=512).max_length == 512


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("top_k", "Did you mean 'topk'?"),
        ("memory_typ", "Did you mean 'memory_type'?"),
        ("masks_by_similarity", "Did you mean 'mask_by_sim'?"),
        ("zzz", "The keys are memory_type, path, enabled,"),
        (7, "The keys are memory_type"),
    ],
)
def test_unknown_keys_name_the_nearest(key, hint):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig.from_dict({key: 1})
    assert f"unknown key {key!r}" in str(caught.value)
    assert hint in str(caught.value)


def test_replace_checks_names_and_values():
    assert MemoryConfig().replace(topk=2) == MemoryConfig(topk=2)
    with pytest.raises(ConfigError, match="Did you mean 'topk'"):
        MemoryConfig().replace(topks=2)
    with pytest.raises(
        ConfigError, match="topk must be a whole number of at least 1, or 'auto'; got 0"
    ):
        MemoryConfig().replace(topk=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- topk\n", "must be a mapping of settings; got a list"),
        ("topk: [1\n", "cannot be read as YAML"),
        ("topk: 0\n", "topk must be a whole number of at least 1, or 'auto'; got 0"),
        ("tpk: 1\n", "Did you mean 'topk'"),
        ("!!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        MemoryConfig.from_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        MemoryConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        MemoryConfig.from_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("num_rows", "topk"),
    [(1, 1), (3, 3), (4, 4), (500, 4), (2249, 4), (2251, 5), (3000, 6), (5749, 11), (10**7, 12)],
)
def test_auto_topk_grows_with_the_memory(num_rows, topk):
    assert MemoryConfig(topk="auto").topk_of(num_rows) == topk


def test_a_topk_that_is_said_does_not_grow():
    assert [MemoryConfig(topk=20).topk_of(num_rows) for num_rows in (7, 20, 10**7)] == [7, 20, 20]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"entropy": 1.0}, "must have the keys entropy and topk; got entropy"),
        ({"entropy": 1.0, "topk": 12, "k": 3}, "must have the keys entropy and topk; got"),
        ({"entropy": -0.1, "topk": 12}, "entropy must be nats, 0 or more; got -0.1"),
        ({"entropy": float("nan"), "topk": 12}, "entropy must be nats"),
        ({"entropy": True, "topk": 12}, "entropy must be nats"),
        ({"entropy": 1, "topk": 12.0}, "topk must be a whole number of at least 1; got 12.0"),
        ({"entropy": 1, "topk": "auto"}, "topk must be a whole number of at least 1; got 'auto'"),
        ({"entropy": 1, "topk": 10}, r"topk \(10\) must be above topk \(10\)"),
    ],
)
def test_uncertainty_is_checked(value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MemoryConfig(uncertainty=value)
    assert str(caught.value).startswith("uncertainty's") or "keys" in message


def test_uncertainty_takes_infinity_and_any_topk_beside_auto(tmp_path):
    config = MemoryConfig(topk="auto", uncertainty={"entropy": float("inf"), "topk": 1})
    config.to_yaml(tmp_path / "config.yaml")
    assert MemoryConfig.from_yaml(tmp_path / "config.yaml") == config
