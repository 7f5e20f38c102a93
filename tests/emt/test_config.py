import dataclasses
import re

import pytest
import yaml

from emt import MemoryConfig
from emt.config import MODEL_SETTINGS, SETTINGS, ModelConfig
from emt.config.yaml_form import GROUPS
from emt.errors import ConfigError

VALUES = {  # setting: its default, another value, and wrong ones
    "memory_type": ("manual", "vector_db", ["faiss", None, 1, True, ["manual"]]),
    "path": (None, "memories/", ["", 3, True, ["a"]]),
    "enabled": (True, False, [1, 0, None, "yes"]),
    "mode": ("auto", "passage", ["tokens", None, True]),
    "stride": (512, 7, [0, -512, 1.0, None, "512", False]),
    "max_length": ("auto", 9, [0, -1, 3072.0, None, True, "long"]),
    "carry_context": ("auto", True, [0, "yes"]),
    "remove_special_ids": (True, False, [1, None, "true"]),
    "special_ids": (None, (), [[-1], [1.5], 1, "1", [True]]),
    "topk": (4, 3, [0, -1, 2.0, "3", None, True]),
    "uncertainty": (None, {"entropy": 1.0, "topk": 12}, [1.0, True, "1.0", (1.0, 12)]),
    "layers": (None, (0, 2), [[], [-1], [1.0], [True], 1, "0", {0: 1}, ["0"]]),
    "heads": ("all", "profile", ["some", None, ["all"], 1]),
    "mask_by_sim": (False, True, [1, 0, None, "yes"]),
    "sim_threshold": (0.25, -0.5, [1.01, -1.01, float("nan"), "0.5", None, True]),
    "routing": ("all", "heads", ["bm25", None, ["heads"]]),
    "passage_rows": (384, 96, [0, -1, 1.5, "9", None, True]),
    "max_passages": (3, 2, [0, 2.0, None, True]),
    "candidates": (12, 0, [-1, 2.0, "3", None, True]),
    "relevance": (2.0, -1.5, ["0.5", True, float("nan"), float("inf")]),
    "reroute": (None, 16, [0, -1, 2.5, "3", True]),
    "profile": (None, "heads.json", ["", 3, True]),
    "index": ("auto", "IVF64,Flat", ["", None, 5]),
    "search_recall": (0.95, 0.9, [0.0, 1.5, "0.9", True]),
    "overfetch": (4, 8, [0, 1.5, True]),
    "sinks": ("one", "all", ["none", None, 4, True]),
    "row_codec": ("auto", "int4", ["int2", "fp16", None]),
    "reread_context": (128, 0, [-1, 1.5, "9", None, True]),
    "reread_bytes": (2**30, 0, [-1, 1e9, None, True]),
    "memory_device": (None, "cuda:1", ["", "gpu", "cuda:x", 0, True]),
    "cache_bytes": (None, 2**30, [0, -1, 1e9, True]),
    "num_shards": (4, 2, [0, 1.5, None, True]),
    "missing_shards": ("error", "warn", ["ignore", None, True]),
    "shard_seconds": (None, 0.5, [0.0, -1.0, float("inf"), "1", True]),
    "ray": (None, "auto", [1, True, ["auto"]]),
    "remote_token_mode": (False, True, [0, None, "yes"]),
}
CHANGED = {name: changed for name, (_, changed, _) in VALUES.items()}


def test_every_setting_is_tested_here_and_has_its_default():
    assert list(VALUES) == list(SETTINGS)
    assert MemoryConfig().to_dict() == {name: default for name, (default, *_) in VALUES.items()}


def test_the_published_method_is_one_call_away():
    published = {
        "mode": "token",
        "max_length": 3072,
        "carry_context": False,
        "topk": 10,
        "sinks": "all",
        "row_codec": "exact",
    }
    assert MemoryConfig.published().to_dict() == {**MemoryConfig().to_dict(), **published}
    assert MemoryConfig.published(topk=3, mode="auto") == MemoryConfig(
        **{**published, "topk": 3, "mode": "auto"}
    )
    with pytest.raises(ConfigError, match=r"'tokp'.* Did you mean 'topk'"):
        MemoryConfig.published(tokp=3)


@pytest.mark.parametrize("name", SETTINGS)
def test_help_explains_every_setting(name):
    text = " ".join(MemoryConfig.__doc__.split())
    each = SETTINGS[name]
    assert f"{name}: {each.doc} Must be {each.expected}; {each.default!r} if not given." in text


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (*_, wrong) in VALUES.items() for value in wrong]
)
def test_wrong_values_are_refused_with_expected_and_got(name, value):
    got = tuple(value) if isinstance(value, list) and name in ("layers", "special_ids") else value
    message = f"{name} must be {SETTINGS[name].expected}; got {got!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        MemoryConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("topk", "a whole number of at least 1, or 'auto'"),
        ("mode", "'token', 'passage' or 'auto'"),
        ("enabled", "true or false"),
        ("reroute", "a whole number of at least 1, or null"),
        ("sim_threshold", "a cosine, -1 to 1"),
        ("layers", "a list of at least one layer index (0, 1, ...), or null"),
        ("index", "'auto' or a FAISS factory string"),
    ],
)
def test_what_is_expected_is_said_in_words(name, expected):
    assert SETTINGS[name].expected == expected


def test_paths_lists_and_whole_numbers_are_converted(tmp_path):
    config = MemoryConfig(path=tmp_path, layers=[1], special_ids=[0], sim_threshold=1)
    assert config == MemoryConfig(
        path=str(tmp_path), layers=(1,), special_ids=(0,), sim_threshold=1.0
    )
    assert isinstance(config.sim_threshold, float)
    assert isinstance(hash(config), int)


def test_is_frozen_and_takes_keywords_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().topk = 3
    with pytest.raises(TypeError, match="positional"):
        MemoryConfig("manual")


def test_windows_must_not_leave_gaps():
    with pytest.raises(ConfigError, match=r"max_length \(511\) .* stride \(512\)"):
        MemoryConfig(max_length=511)
    assert MemoryConfig(max_length=512).max_length == 512


def test_every_passage_must_have_a_row():
    with pytest.raises(ConfigError, match=r"passage_rows \(2\) .* max_passages \(3\)"):
        MemoryConfig(passage_rows=2)
    assert MemoryConfig(passage_rows=3).passage_rows == 3


def test_replace_checks_names_and_values():
    assert MemoryConfig().replace(topk=2) == MemoryConfig(topk=2)
    with pytest.raises(ConfigError, match=r"'topks'.*'topk'"):
        MemoryConfig().replace(topks=2)
    with pytest.raises(ConfigError, match=r"'zzz'.*memory_type, path, enabled"):
        MemoryConfig().replace(zzz=2)
    with pytest.raises(ConfigError, match=r"topk .* got 0"):
        MemoryConfig().replace(topk=0)


# -- YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, CHANGED], ids=["defaults", "all changed"])
def test_yaml_round_trip(tmp_path, values):
    config, path = MemoryConfig(**values), tmp_path / "config.yaml"
    config.to_yaml(path)
    assert MemoryConfig.from_yaml(path) == config
    grouped = yaml.safe_load(path.read_text())
    assert list(grouped) == ["memory_type", "path", "enabled", "mode", *GROUPS]
    assert MemoryConfig.from_dict(grouped) == config
    assert MemoryConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("value", ["a: b", "- c", "{d}", "# e", "'f", '"g', "null", "x" * 300])
def test_any_text_is_written_so_that_it_is_read_again(tmp_path, value):
    MemoryConfig(path=value).to_yaml(tmp_path / "config.yaml")
    assert MemoryConfig.from_yaml(tmp_path / "config.yaml").path == value


def test_no_group_has_the_name_of_a_setting():
    assert not set(GROUPS) & set(SETTINGS)
    assert {each.group for each in SETTINGS.values()} == {None, *GROUPS}


@pytest.mark.parametrize(
    "text",
    [
        "topk: 4\nlayers: [2, 0]\nstride: 9\n",
        "token: {topk: 4, layers: [2, 0]}\nreading: {stride: 9}\n",
        "stride: 9\nsearch:\ntoken: {topk: 4, layers: [2, 0]}\n",
    ],
    ids=["flat", "grouped", "both, and an empty group"],
)
def test_settings_may_be_in_groups_or_flat(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert MemoryConfig.from_yaml(path) == MemoryConfig(topk=4, layers=(2, 0), stride=9)


def test_what_a_file_does_not_name_is_as_in_defaults_or_the_class(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# nothing\n")
    assert MemoryConfig.from_yaml(path) == MemoryConfig()
    path.write_text("token: {topk: 4}\n")
    config = MemoryConfig.from_yaml(path, defaults={"topk": 3, "stride": 9})
    assert config == MemoryConfig(topk=4, stride=9)
    with pytest.raises(ConfigError, match="'strides'"):
        MemoryConfig.from_yaml(path, defaults={"strides": 9})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 1}, "'top_k'.*'topk' .in the group 'token'."),
        ({"search": {"memory_typ": "manual"}}, "'memory_typ'.*'memory_type' .at the top level."),
        ({"masks_by_similarity": True}, "'mask_by_sim'"),
        ({"pasage": {"reroute": 1}}, "'pasage'.*the group 'passage'"),
        ({"zzz": 1}, "'zzz'.*memory_type, path, enabled,"),
        ({7: 1}, "unknown key 7 .*memory_type"),
        ({"passage": {"topk": 3}}, "'topk' .*'token'.*'passage'"),
        ({"token": {"path": "m"}}, "'path' .*top level.*'token'"),
        ({"topk": 3, "token": {"topk": 3}}, "'topk' is given twice.*'token'"),
        ({"token": 3}, r"'token' is a group of settings \(topk, .* got 3"),
        ({"token": {"topk": 0}}, "topk .* got 0"),
    ],
)
def test_misplaced_and_misspelt_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        MemoryConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- topk\n", "mapping of settings; got a list"),
        (b"topk: [1\n", "cannot be read as YAML"),
        (b"topk: 0\n", "topk .* got 0"),
        (b"tpk: 1\n", "'tpk'.*'topk'"),
        (b"token:\n  topk: 1\n  topk: 1\n", "'topk' is given twice.*line 3"),
        (b"!!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (None, "No such file"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as caught:
        MemoryConfig.from_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the model's group ----------------------------------------------------------------------------


def test_a_file_may_say_how_the_model_is_loaded(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("token: {topk: 4}\nmodel: {name: m, device: 'cuda:1', dtype: bfloat16}\n")
    assert ModelConfig.from_yaml(path) == ModelConfig(name="m", device="cuda:1", dtype="bfloat16")
    assert MemoryConfig.from_yaml(path) == MemoryConfig(topk=4)
    path.write_text("topk: 4\nmodel:\n")
    assert ModelConfig.from_yaml(path) == ModelConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dtype: float7}", "dtype must be 'auto', .*'float64'; got 'float7'"),
        ("model: {device: 1}", "device must be .*, or null; got 1"),
        ("model: {attn_implementation: ''}", "attn_implementation must be "),
        ("model: {dtyp: auto}", "unknown model setting 'dtyp'. Did you mean 'dtype'?"),
        (
            "model: {zzz: 1}",
            "unknown model setting 'zzz'. The settings are name, device, dtype, attn_",
        ),
        ("model: smollm2", "'model' is a group of settings .*; got 'smollm2'"),
    ],
)
def test_wrong_settings_of_a_model_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^config '{re.escape(str(path))}': {message}"):
        ModelConfig.from_yaml(path)


def test_the_models_settings_are_explained_and_apart_from_the_memorys():
    assert "model" not in {*GROUPS, *SETTINGS}
    text = " ".join(ModelConfig.__doc__.split())
    assert all(f"{name}: {each.doc}" in text for name, each in MODEL_SETTINGS.items())


# -- topk and uncertainty -----------------------------------------------------------------------


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
        ({"entropy": 1.0}, "uncertainty .*entropy and topk; got entropy"),
        ({"entropy": 1.0, "topk": 12, "k": 3}, "uncertainty .*entropy and topk; got .*k"),
        ({"entropy": -0.1, "topk": 12}, "uncertainty's entropy .* got -0.1"),
        ({"entropy": float("nan"), "topk": 12}, "uncertainty's entropy .* got nan"),
        ({"entropy": True, "topk": 12}, "uncertainty's entropy .* got True"),
        ({"entropy": 1, "topk": 12.0}, "uncertainty's topk .* got 12.0"),
        ({"entropy": 1, "topk": "auto"}, "uncertainty's topk .* got 'auto'"),
        ({"entropy": 1, "topk": 4}, r"uncertainty's topk \(4\) .* topk \(4\)"),
    ],
)
def test_uncertainty_is_checked(value, message):
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(uncertainty=value)


def test_uncertainty_takes_infinity_and_any_topk_beside_auto(tmp_path):
    config = MemoryConfig(topk="auto", uncertainty={"entropy": float("inf"), "topk": 1})
    config.to_yaml(tmp_path / "config.yaml")
    assert MemoryConfig.from_yaml(tmp_path / "config.yaml") == config
