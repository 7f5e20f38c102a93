"""What the README shows must run: its Python as it stands, its commands with their options."""

from __future__ import annotations

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
    assert len(blocks) == 2
    names = {"NAME": str(tmp_path / "model"), "TEXT": TEXT, "PROMPT": "w22 w23"}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "memories" / "catalog.sqlite").is_file()
    assert {citation.document for citation in names["found"]} == {"grothendieck.txt"}
    ids = names["inputs"].input_ids
    assert torch.equal(names["output"][:, : ids.shape[1]], ids)
    assert names["output"].shape[1] > ids.shape[1]


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
