import json
import platform
import subprocess

import torch
import pytest
from experiments import about
from experiments.results import Results, read_results

from emt.errors import ConfigError

SETTINGS = {"model": "tiny", "memory": {"topk": 3}, "sizes": (1, 2)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "results.jsonl"


def test_what_was_added_is_there_when_opened_again(path):
    results = Results(path, "trial", SETTINGS)
    results.add("a", {"right": True, "text": "Zoë\u2028"})
    results.add("b", {"right": False})
    again = Results(path, "trial", SETTINGS)
    assert again.items == {"a": {"right": True, "text": "Zoë\u2028"}, "b": {"right": False}}
    assert ("a" in again, "c" in again, len(again)) == (True, False, 2)
    again.add("c", {})
    assert read_results(path) == (again.header, again.items)
    with pytest.raises(ValueError, match="item 'a' is in"):
        again.add("a", {})


def test_the_header_says_what_where_and_with_which_code(path):
    header = Results(path, "trial", SETTINGS).header
    assert header["experiment"] == "trial"
    assert header["settings"] == {"model": "tiny", "memory": {"topk": 3}, "sizes": [1, 2]}
    assert header["versions"]["torch"] == torch.__version__
    assert header["python"] == platform.python_version()
    assert "core" in header["machine"]
    assert json.loads(path.read_text().splitlines()[0]) == header


def test_a_line_that_was_cut_off_is_dropped(path):
    results = Results(path, "trial", SETTINGS)
    results.add("a", {"right": True})
    whole = path.read_bytes()
    for cut in (b'{"key": "b", "ri', b"{", b"\xff"):
        path.write_bytes(whole + cut)
        again = Results(path, "trial", SETTINGS)
        assert list(again.items) == ["a"]
        assert path.read_bytes() == whole
    again.add("b", {"right": False})
    assert list(read_results(path)[1]) == ["a", "b"]


@pytest.mark.parametrize("kept", [0, 1, 14, 40])
def test_a_first_line_that_was_cut_off_is_written_again(path, kept):
    Results(path, "trial", SETTINGS)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 1
    path.write_bytes(whole[:kept])
    results = Results(path, "trial", SETTINGS)
    results.add("a", {})
    assert path.read_bytes() == whole + b'{"key": "a"}\n'


@pytest.mark.parametrize(
    ("experiment", "settings", "said"),
    [
        ("other", SETTINGS, "experiment 'trial', not 'other'"),
        ("trial", {**SETTINGS, "model": "big"}, "model 'tiny' (now 'big')"),
        ("trial", {"model": "tiny"}, "memory {'topk': 3} (now None)"),
    ],
)
def test_results_of_another_run_are_refused_and_left_as_they_are(path, experiment, settings, said):
    Results(path, "trial", SETTINGS).add("a", {})
    before = path.read_bytes() + b'{"cut'
    path.write_bytes(before)
    with pytest.raises(ConfigError) as caught:
        Results(path, experiment, settings)
    assert said in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"}", b"{}\n", b'{"other": 1', b"nonsense\n", b"[1]\n", b'{"experiment": 1}\n[]\n']
)
def test_what_is_no_results_file_is_refused(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a file of results"):
        Results(path, "trial", SETTINGS)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path / "missing.jsonl")


def test_an_output_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        Results(tmp_path / "file" / "results.jsonl", "trial", SETTINGS)


def test_the_revision_says_if_files_were_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    (tmp_path / "about.py").write_text("1")
    monkeypatch.setattr(about, "__file__", str(tmp_path / "about.py"))
    assert about.revision() is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")[:12]
    (tmp_path / "new.txt").write_text("not tracked")
    assert about.revision() == commit
    (tmp_path / "about.py").write_text("2")
    assert about.revision() == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert about.revision() is None
