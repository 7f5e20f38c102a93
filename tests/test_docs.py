"""What the pages name is there: links, commands with their options, files, settings, public names.

`tests/test_docs_python.py` runs the Python that they show.
"""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import emt
import memory_backends
from emt.cli import main
from emt.config import SETTINGS
from emt.serving.keys import Keys
from emt.serving.limits import Limits
from emt.serving.schemas import MemoryOptions
from tests.pages import MEASURED, PAGES, ROOT, shell_of, text_of

FOLDERS = "emt|memory_backends|tests|scripts|configs|docs|benchmarks"
MOST_LINES = 150  # of README.md


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= MOST_LINES


def test_the_readme_counts_the_families_of_the_table() -> None:
    (counted,) = re.findall(r"(\d+ of \d+) families", text_of("README.md"))
    assert f"\n{counted} buildable families work" in text_of("docs/families.md")


def anchors_of(page: str) -> set[str]:
    """Return the names of a page's headings, as the site and the forge make them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES + MEASURED)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target.resolve().relative_to(ROOT).as_posix()), link


def commands() -> dict[str, set[str]]:
    """Return the subcommands of `emt` that the pages show, with the options of each."""
    shown: dict[str, set[str]] = {}
    for page in PAGES:
        for line in shell_of(page):
            found = re.match(r"(?:python -m )?emt ([a-z]+)\b", line)
            if found:
                shown.setdefault(found[1], set()).update(re.findall(r"(?<!\S)\[?(--[a-z-]+)", line))
    return shown


COMMANDS = commands()


def test_every_command_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, flags=re.M)
    assert len(listed) > 10
    assert set(listed) <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_options_that_are_shown(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    assert not {option for option in COMMANDS[command] if option not in help_text}


@pytest.mark.parametrize("page", PAGES)
def test_scripts_targets_and_extras_that_a_page_names_are_there(page: str) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "scripts/experiments").rglob("*.py"))
    for script, options in re.findall(r"python (scripts/\S+\.py)([^`\n]*)", text_of(page)):
        source = (ROOT / script).read_text(encoding="utf-8") + sources
        for option in re.findall(r"(?<!\S)--[a-z-]+", options):
            assert f'"{option}"' in source, f"{script} {option}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), flags=re.M)) <= set(targets)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"\bemt\[([a-z,]+)\]", text_of(page))
    extras = {extra for several in named for extra in several.split(",")}
    assert extras <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_a_page_names_are_there(page: str) -> None:
    text = re.sub(r"`[^`]+` \(new\)", "", text_of(page))
    paths = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w", text))
    places = (ROOT, (ROOT / page).parent)
    assert not {path for path in paths if not any((place / path).exists() for place in places)}
    modules = set(re.findall(r"(?<![\w./])(?:emt|memory_backends)(?:\.\w+)+", text))
    assert not {name for name in modules if not exists(name)}


def exists(dotted: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def test_settings_that_are_explained_are_there() -> None:
    text = text_of("docs/settings.md")
    explained = re.findall(r"\*\*`(\w+)(?:: [^`]+)?`\*\*", text)
    advised = re.findall(r"^\|[^|]*\|.*?`(\w+)(?:: [^`]+)?`", text, flags=re.M)
    assert len(explained) > 10
    assert set(explained) <= set(SETTINGS)
    assert len(set(advised) & set(SETTINGS)) > 8


def test_the_operators_guide_has_the_keys_limits_and_options_of_the_server(tmp_path: Path) -> None:
    guide = text_of("docs/guides/operator.md")
    (keys,) = re.findall(r"^```yaml\n(.*?)^```$", guide, flags=re.M | re.S)
    (tmp_path / "keys.yaml").write_text(keys, encoding="utf-8")
    access = Keys.read(tmp_path / "keys.yaml").access("a-long-random-text-of-anns-own")
    assert access is not None
    assert (access.name, access.can_write) == ("ann", True)
    for name, default in re.findall(r"^\| `--([a-z-]+)` \| ([\d,]+) \|", guide, flags=re.M):
        assert getattr(Limits(), name.replace("-", "_")) == int(default.replace(",", ""))
    section = guide.partition("may have an object `memory`")[2].partition("\n\nEach choice")[0]
    options = re.findall(r"`(\w+)`", "".join(re.findall(r"^(\|[^|]*\|)", section, flags=re.M)))
    assert set(options) == set(MemoryOptions.model_fields)


@pytest.mark.parametrize("package", [emt, memory_backends])
def test_the_api_page_has_every_public_name(package: ModuleType) -> None:
    named = re.findall(r"^::: (\S+)$", text_of("docs/python-api.md"), flags=re.M)
    assert len(named) == len(set(named))
    described = [pkgutil.resolve_name(name) for name in named]
    for name in package.__all__:
        assert any(getattr(package, name) is each for each in described), name


@pytest.mark.parametrize("page", PAGES)
def test_public_names_that_a_page_uses_are_public(page: str) -> None:
    for package in (emt, memory_backends):
        used = set(re.findall(rf"\b{package.__name__}\.([A-Z]\w+)", text_of(page)))
        assert used <= set(package.__all__)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # material's advertisement
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "python-api" / "index.html").read_text(encoding="utf-8")
    for name in ("emt.Memory.write", "emt.MemoryConfig", "memory_backends.verify"):
        assert f'id="{name}"' in api
    settings = (tmp_path / "settings" / "index.html").read_text(encoding="utf-8")
    assert "passage_rows" in settings.partition('id="all-settings"')[2]
