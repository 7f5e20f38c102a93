"""What the README shows must run: its Python as it stands, its commands with their options.

And what any page names must be there: files, folders, modules and settings.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import pytest

import emt
from emt import attach, detach
from emt.cli import main
from emt.config import SETTINGS
from emt.modes.passage.likelihood import QuestionLikelihood
from emt.passage import Passage
from emt.routing.question import Asking
from memory_backends import MemoryBackend
from tests.emt.commands import make_model
from tests.emt.routing.worlds import profile_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "docs/store.md", "docs/families.md"]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
TEXT = "w20 w21 w22 w23 w24 w25 w26 w27. w28 w29 w30 w31 w32 w33 w34 w35."
WORDS = {"TEXT": TEXT, "OTHER_TEXT": "w40 w41 w42", "PROMPT": "w22 w23"}
FOLDERS = "emt|memory_backends|tests|scripts|configs|docs|benchmarks"


def test_the_number_of_blocks() -> None:
    assert len(BLOCKS) == 6


def test_the_python_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"NAME": str(tmp_path / "model"), **WORDS}
    # A random model finds no question likelier after any passage.
    monkeypatch.setattr(QuestionLikelihood, "__call__", _likelier_after_passages)
    for block in BLOCKS[:3]:
        exec(block, names)
    assert (tmp_path / "memories" / "catalog.sqlite").is_file()
    assert {citation.document for citation in names["citations"]} == {"grothendieck.txt"}
    ids = names["inputs"].input_ids
    assert torch.equal(names["output"][:, : ids.shape[1]], ids)
    assert names["output"].shape[1] > ids.shape[1]
    _keep_a_profile(names)
    exec(BLOCKS[3], names)
    assert names["profile"].model == "tiny"
    assert {routed.passage.document for routed in names["passages"]} == {"grothendieck.txt"}
    assert [citation.document for citation in names["citations"]] == ["grothendieck.txt"]


def _likelier_after_passages(
    likelihood: QuestionLikelihood,
    asking: Asking,
    passages: Sequence[Passage],
    backend: MemoryBackend,
    *,
    beside: Sequence[Passage] | None = None,
) -> torch.Tensor:
    return torch.tensor([[-1.0] * 3] * len(passages) + [[-9.0] * 3])


def _keep_a_profile(names: dict[str, Any]) -> None:
    """Give the store of the blocks before a head profile, as `emt index` does."""
    profile = profile_of(names["model"])
    memory = attach(names["model"], names["MemoryConfig"](path="memories/"))
    memory.keep_profile(profile)
    memory.close()
    detach(names["model"])


def test_the_published_interface_runs_as_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    make_model(tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "extended-llama", "auto_map": {"AutoConfig": "configuration.Absent"}}
    (tmp_path / "published" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"NAME": "model", "PATH": "published", **WORDS}
    exec(BLOCKS[4], names)
    num_layers = names["model"].config.num_hidden_layers
    assert len(names["idx"]) == len(names["weights"]) == num_layers
    heads = names["model"].config.num_attention_heads
    assert names["idx"][0].shape == (1, heads, 10)
    assert names["model"].memory_ids == names["tokenizer"]("w40 w41 w42").input_ids
    assert len(names["keys_and_values"]) == num_layers
    exec(BLOCKS[5], names)
    assert names["again"].memory_ids == names["memory_ids"]
    plain = names["again"](names["inputs"], topk=0).logits
    logits = names["again"](names["inputs"]).logits
    assert torch.equal(logits, names["model"](names["inputs"]).logits)
    assert (logits - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    "command", ["index", "generate", "profile", "info", "remove", "verify", "compact", "rebuild"]
)
def test_the_command_line_has_the_options_that_are_shown(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.findall(rf"^emt {command} .*$", README, flags=re.M)
    assert shown
    with pytest.raises(SystemExit):
        main([command, "--help"])
    help_text = capsys.readouterr().out
    for option in re.findall(r"--[a-z-]+", shown[0]):
        assert option in help_text


def test_no_command_is_shown_that_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    for command in set(re.findall(r"^emt ([a-z]+) ", README, flags=re.M)):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0, command
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_a_page_names_are_there(page: str) -> None:
    text = re.sub(r"`[^`]+` \(new\)", "", (ROOT / page).read_text(encoding="utf-8"))
    paths = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w", text))
    assert paths
    modules = set(re.findall(r"(?<![\w./])(?:emt|memory_backends)(?:\.\w+)+", text))
    assert not {path for path in paths if not (ROOT / path).exists()}
    assert not {name for name in modules if not _exists(name)}


def _exists(dotted: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def test_settings_that_the_readme_explains_are_there() -> None:
    section = README.partition("## Choosing settings")[2].partition("\n## ")[0]
    names = re.findall(r"^\* \*\*`(\w+)(?:: [^`]+)?`\*\*", section, flags=re.M)
    assert len(names) > 5
    assert set(names) <= set(SETTINGS)


def test_public_names_that_the_readme_uses_are_there() -> None:
    used = set(re.findall(r"\bemt\.([A-Z]\w+)", README))
    assert used
    assert used <= set(emt.__all__)
