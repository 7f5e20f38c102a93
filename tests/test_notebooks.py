"""The notebooks of docs/notebooks run from top to bottom, and say what is stored in them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.pages import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
# Of each notebook, what its cells must print: answers with their sources.
SAYS = {
    "citations": ("George Potter", "beans.txt: The name of the blacksmith", "()"),
    "published": ("topk 0: ' 1920", "topk 4: ' 1971", "keys of layer 0: (1, 3, "),
    "your_own": ("10 documents added", "George Potter", "behind the clock", "ready: 200"),
}


def printed(cells: list[dict]) -> str:
    """Return what cells of a notebook print."""
    outputs = [each for cell in cells for each in cell.get("outputs", ())]
    return "\n".join("".join(each.get("text", "")) for each in outputs)


def test_each_notebook_is_tried() -> None:
    assert set(NAMES) == set(SAYS)


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_of_a_whole_run_and_name_no_machine(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    here = (Path("/home"), Path.home(), Path(tempfile.gettempdir()), ROOT)
    assert not [folder for folder in here if f"{folder}/" in text]
    for expected in SAYS[name]:
        assert expected in printed(cells)


@pytest.mark.model
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs `pip install -e '.[dev]'`")
    from nbclient import NotebookClient

    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    shutil.copy(FOLDER / f"{name}.ipynb", folder)
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
    )
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    options = {
        "timeout": 240,
        "kernel_name": "python3",
        "resources": {"metadata": {"path": str(folder)}},
    }
    NotebookClient(notebook, **options).execute()
    for expected in SAYS[name]:
        assert expected in printed(notebook.cells)
