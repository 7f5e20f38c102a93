"""The wheel: both packages with their types, the command, the licence, and nothing else."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("emt", "memory_backends")
SUFFIXES = {".py", ".json", ".html", ".css", ".js", ".svg"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy, so that the working tree stays as it is."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "dist", "benchmarks"
    )
    shutil.copytree(ROOT, tree, ignore=ignored, dirs_exist_ok=True)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_both_packages_are_in_it_with_their_types_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in SUFFIXES or path.name == "py.typed"
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert not [name for name in names if "experiment" in name]  # they are run from scripts/


def test_it_installs_the_command_and_carries_the_licence(wheel):
    texts = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist()}
    scripts = configparser.ConfigParser()
    scripts.read_string(texts["entry_points.txt"])
    assert dict(scripts["console_scripts"]) == {"emt": "emt.cli:main"}
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    metadata = Parser().parsestr(texts["METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Name"] == "emt"


def test_faiss_is_an_extra_and_the_rest_is_required(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
    requires = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist")
    extras = {}
    for requirement in requires:
        package = re.match(r"[A-Za-z0-9_.-]+", requirement)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        extras.setdefault(extra[1] if extra else None, set()).add(package)
    assert extras["cpu"] == {"faiss-cpu"}
    assert extras["gpu"] == {"faiss-gpu"}
    assert {"torch", "transformers", "numpy"} <= extras[None]
    assert not extras["experiments"] & extras[None]
    assert not {name for name in extras[None] if name.startswith("faiss")}


def test_no_package_imports_the_experiments():
    importing = [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(from|import) experiments", path.read_text(encoding="utf-8"), re.M)
    ]
    assert importing == []
