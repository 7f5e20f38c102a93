"""A .gguf file is parsed once; whatever happens to what is kept, the weights are the file's."""

import errno
import os
import shutil
import time

import torch
import pytest
from transformers import LlamaForCausalLM

from emt.model import gguf
from emt.model.loading import load
from tests.tiny_gguf import write_gguf

PLAIN = {  # tensors that the file has as the model does: no heads in another order
    "token_embd": "model.embed_tokens.weight",
    "output": "lm_head.weight",
    "blk.1.attn_v": "model.layers.1.self_attn.v_proj.weight",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj.weight",
    "output_norm": "model.norm.weight",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tiny.gguf"


@pytest.fixture
def values(file):
    return write_gguf(file)


def messages_of(file, values, **how):
    """Load a file, compare its weights with the values written, and return what was said."""
    messages = []
    loaded = load(str(file), on_message=messages.append, **how)
    weights = loaded.model.state_dict()
    for name, own_name in PLAIN.items():
        assert torch.equal(weights[own_name], torch.from_numpy(values[name]))
    assert loaded.source == str(file)
    assert loaded.tokenizer("abba 7").input_ids == [38, 3, 2, 39, 35]
    return messages


def folder_in(cache):
    (folder,) = cache.iterdir()  # nothing beside it
    return folder


def test_a_file_is_parsed_once(cache, file, values, monkeypatch):
    (message,) = messages_of(file, values)
    assert message.startswith("'tiny.gguf' is converted once")
    assert str(folder_in(cache)) in message
    with monkeypatch.context() as patch:
        patch.delattr(gguf, "parsed")
        assert messages_of(file, values) == []
    parsed = load_without_cache(file, monkeypatch)
    kept = load(str(file))
    for name, weight in parsed.model.state_dict().items():
        assert torch.equal(weight, kept.model.state_dict()[name])


def load_without_cache(file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("EMT_CACHE", str(file))  # a file can have no folder in it
        return load(str(file))


@pytest.mark.parametrize("load_it", [lambda file, _: load(str(file)), load_without_cache])
def test_its_model_is_a_plain_one(cache, file, values, monkeypatch, tmp_path, load_it):
    loaded = load_it(file, monkeypatch)
    ids = torch.tensor([[2, 3, 4]])
    expected = loaded.model(ids).logits
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(str(tmp_path / "saved")).model(ids).logits, expected)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, expected)
    assert loaded.model.float().to(torch.bfloat16).dtype == torch.bfloat16
    assert load_it(file, monkeypatch).model.dtype == torch.float32


def test_the_dtype_asked_for_is_not_kept(cache, file, values):
    assert load(str(file), dtype="bfloat16").model.dtype == torch.bfloat16
    assert messages_of(file, values) == []


def test_a_file_replaced_under_its_name_is_another_one(cache, file, values):
    messages_of(file, values)
    stat = file.stat()
    others = write_gguf(file, seed=1)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert len(messages_of(file, others)) == 1
    assert len(list(cache.iterdir())) == 2


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def lose(folder):
    (folder / "tokenizer.json").unlink()


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def list_nothing(folder):
    (folder / "checksums.json").write_text("{}")


def garble(folder):
    (folder / "checksums.json").write_bytes(b"\xff[1]")


@pytest.mark.parametrize("damage", [cut, flip, lose, empty, list_nothing, garble])
def test_a_damaged_folder_is_made_anew(cache, file, values, damage):
    messages_of(file, values)
    damage(folder_in(cache))
    assert len(messages_of(file, values)) == 1
    assert messages_of(file, values) == []
    folder_in(cache)


def test_a_cache_that_cannot_be_written(tmp_path, file, values, monkeypatch):
    monkeypatch.setenv("EMT_CACHE", str(file))
    for _ in range(2):
        (message,) = messages_of(file, values)
        assert "cannot be kept" in message
        assert "EMT_CACHE" in message


def test_a_user_without_a_home(file, values, monkeypatch):
    monkeypatch.setenv("EMT_CACHE", "~nobody-of-this-name/cache")
    (message,) = messages_of(file, values)
    assert "cannot be kept in the user's cache: the home directory" in message


def test_a_copy_under_another_name_is_not_parsed_again(cache, file, values):
    copy = shutil.copy(file, file.with_name("copy.gguf"))
    messages_of(file, values)
    assert messages_of(copy, values) == []
    folder_in(cache)


def test_a_full_disk_leaves_nothing_behind(cache, file, values, monkeypatch):
    def full(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        _, message = messages_of(file, values)
    assert "No space left on device" in message
    assert list(cache.iterdir()) == []
    assert len(messages_of(file, values)) == 1


def test_of_two_first_runs_one_folder_is_left(cache, file, values, monkeypatch):
    seal = gguf._seal

    def overtaken(partial):
        monkeypatch.setattr(gguf, "_seal", seal)
        assert len(messages_of(file, values)) == 1  # the other, from beginning to end
        seal(partial)

    monkeypatch.setattr(gguf, "_seal", overtaken)
    assert len(messages_of(file, values)) == 1
    folder_in(cache)
    assert messages_of(file, values) == []


def test_leftovers_are_removed(cache, file, values, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers.__version__", "5.0.0")
        messages_of(file, values)
    for name, age in (("killed", 2 * 86400), ("running", 60)):
        (cache / f".partial-{name}").mkdir()
        os.utime(cache / f".partial-{name}", (time.time() - age,) * 2)
    assert len(messages_of(file, values)) == 1
    names = sorted(path.name for path in cache.iterdir())
    assert names[0] == ".partial-running"
    assert len(names) == 2
    assert "5.0.0" not in names[1]


def test_a_link_keeps_its_name(cache, file, values, tmp_path):
    blob = file.rename(tmp_path / "0123abcd")  # as the hub's cache keeps files
    file.symlink_to(blob)
    messages_of(file, values)
    assert messages_of(file, values) == []


def test_any_file_name_will_do(cache, tmp_path):
    file = tmp_path / ("ein Modell \n" + "x" * 200 + ".gguf")
    assert len(messages_of(file, write_gguf(file))) == 1
    assert messages_of(file, write_gguf(file)) == []
