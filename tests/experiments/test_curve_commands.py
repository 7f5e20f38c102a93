"""The commands of both experiments, in this process, with a tiny model."""

import importlib.util
import sys

import pytest
import yaml

from tests.emt.commands import ROOT, make_model
from tests.experiments.long_texts import write_texts

BASES = {
    "perplexity": {"lengths": [20, 40], "window": 24, "scored": 6},
    "timing": {"lengths": [20], "query_tokens": 5, "new_tokens": 2, "measured": 1, "rounds": 1},
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Return a function that runs a script with a tiny model, and gives code, output, errors."""
    scripts = ROOT / "scripts"
    monkeypatch.syspath_prepend(scripts)
    make_model(tmp_path / "model")
    data = write_texts(tmp_path / "texts.jsonl", 60)
    capsys.readouterr()  # the progress bar of saving a model

    def run(name, *arguments, **changes):
        base = tmp_path / f"{name}.yaml"
        memory = {"stride": 8, "max_length": 16}
        base.write_text(yaml.safe_dump({"data": data, "memory": memory, **BASES[name], **changes}))
        given = ["--base", base, "--model", tmp_path / "model", "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [f"run_{name}.py", *map(str, [*given, *arguments])])
        spec = importlib.util.spec_from_file_location("__main__", scripts / f"run_{name}.py")
        code = 0
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", BASES)
def test_a_command_writes_results_table_and_picture(command, tmp_path, name):
    code, out, err = command(name)
    assert (code, err) == (0, "")
    text = (tmp_path / "out" / "summary.md").read_text()
    assert out == f"{text}\nin '{tmp_path / 'out'}'\n"
    assert "| 40 | 1 |" in out if name == "perplexity" else "| EMT vector_db |" in out
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"results.jsonl", "summary.md", f"{name}.png"}
    before = (tmp_path / "out" / "results.jsonl").read_text()
    assert command(name)[:2] == (0, out)  # nothing is measured again
    assert (tmp_path / "out" / "results.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "scored=24"], "scored (24) must be below the window (24)"),
        (["--set", "length=[20]"], "Did you mean 'lengths'?"),
        (["--set", "data=none.jsonl"], "texts 'none.jsonl' cannot be read"),
        (["--preset", "huge"], "no preset 'huge'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, arguments, message):
    code, out, err = command("perplexity", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_results_of_another_config_are_refused(command):
    assert command("perplexity")[0] == 0
    code, _, err = command("perplexity", "--set", "scored=5")
    assert code == 2
    assert "scored 6 (now 5)" in err


@pytest.mark.parametrize("name", BASES)
def test_without_matplotlib_there_is_a_table_and_one_line(command, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = command(name)
    assert code == 2
    assert out.startswith((tmp_path / "out" / "summary.md").read_text())
    assert err.startswith("plots need matplotlib. Install it with")
    assert err.count("\n") == 1
