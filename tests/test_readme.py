"""What the README shows must run: its Python as it stands, its commands with their options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import pytest

from emt.cli import main
from tests.emt.commands import make_model

README = Path(__file__).resolve().parent.parent / "README.md"
TEXT = "w20 w21 w22 w23 w24 w25 w26 w27. w28 w29 w30 w31 w32 w33 w34 w35."


def test_the_python_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 5
    names = {"NAME": str(tmp_path / "model"), "TEXT": TEXT, "PROMPT": "w22 w23"}
    for block in blocks[:3]:
        exec(block, names)
    assert (tmp_path / "memories" / "catalog.sqlite").is_file()
    assert {citation.document for citation in names["citations"]} == {"grothendieck.txt"}
    ids = names["inputs"].input_ids
    assert torch.equal(names["output"][:, : ids.shape[1]], ids)
    assert names["output"].shape[1] > ids.shape[1]


def test_the_published_interface_runs_as_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    make_model(tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "extended-llama", "auto_map": {"AutoConfig": "configuration.Absent"}}
    (tmp_path / "published" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    names = {"NAME": "model", "PATH": "published", "TEXT": TEXT, "PROMPT": "w22 w23"}
    names["OTHER_TEXT"] = "w40 w41 w42"
    exec(blocks[3], names)
    num_layers = names["model"].config.num_hidden_layers
    assert len(names["idx"]) == len(names["weights"]) == num_layers
    heads = names["model"].config.num_attention_heads
    assert names["idx"][0].shape == (1, heads, 10)
    assert names["model"].memory_ids == names["tokenizer"]("w40 w41 w42").input_ids
    assert len(names["keys_and_values"]) == num_layers
    exec(blocks[4], names)
    assert names["again"].memory_ids == names["memory_ids"]
    plain = names["again"](names["inputs"], topk=0).logits
    found = names["again"](names["inputs"]).logits
    assert torch.equal(found, names["model"](names["inputs"]).logits)
    assert (found - plain).abs().max() > 1e-4


@pytest.mark.parametrize("command", ["index", "generate", "info", "remove"])
def test_the_command_line_has_the_options_that_are_shown(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.findall(rf"^emt {command} .*$", README.read_text(encoding="utf-8"), flags=re.M)
    assert shown
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = capsys.readouterr().out
    for option in re.findall(r"--[a-z-]+", shown[0]):
        assert option in known
