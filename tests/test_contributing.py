"""The map in CONTRIBUTING.md: its tree, and walks through files that are there and that run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from emt import MemoryConfig, attach
from tests.emt.commands import TEXTS, emt, make_model
from tests.emt.routing.worlds import asked, build, chosen, routing

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST_FILES = {
    "Follow a decode step": 10,
    "Follow a passage into generate()": 15,
    "Follow a file into the store": 17,
    "Add a family": 4,
    "Add a backend": 3,
}


def section(title: str) -> str:
    """Return what stands under a heading, up to the next one."""
    (_, text) = re.split(rf"^#+ {re.escape(title)}$", TEXT, flags=re.M)
    return re.split(r"^#+ ", text, flags=re.M)[0]


def steps_of(walk: str) -> list[tuple[int, str, bool]]:
    """Return number and path of each step of a walk, and whether the file is a new one."""
    pattern = r"^(\d+)\. `([^`]+)`( \(new\))?: \S"
    steps = re.findall(pattern, section(walk), flags=re.M)
    assert len(steps) == len(re.findall(r"^\d+\.", section(walk), flags=re.M))
    return [(int(number), path, bool(is_new)) for number, path, is_new in steps]


def files_that_run(action: Callable[[], Any]) -> set[str]:
    """Return the files of this repository with a function that an action calls."""
    paths: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            paths.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    inside = (Path(path) for path in paths)
    return {path.relative_to(ROOT).as_posix() for path in inside if path.is_relative_to(ROOT)}


def paths_of(walk: str) -> set[str]:
    return {path for _, path, _ in steps_of(walk)}


@pytest.mark.parametrize("walk", MOST_FILES)
def test_a_walk_is_short_and_its_files_are_there(walk: str) -> None:
    steps = steps_of(walk)
    assert [number for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert 0 < len(steps) <= MOST_FILES[walk]
    assert len(paths_of(walk)) == len(steps)
    for _, path, is_new in steps:
        assert (ROOT / path).is_file() != is_new, path


def test_a_decode_step_runs_the_files_of_its_walk(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = MemoryConfig.published(
        memory_type="vector_db", path=str(tmp_path / "store"), mode="token"
    )
    memory = attach(model, config, tokenizer=tokenizer)
    memory.write(TEXTS["a.txt"], document="a")
    inputs = tokenizer("w22 w23", return_tensors="pt").input_ids
    cache = model(inputs, use_cache=True).past_key_values
    step = files_that_run(lambda: model(inputs[:, -1:], past_key_values=cache, use_cache=True))
    assert paths_of("Follow a decode step") <= step


def test_generate_runs_the_files_of_a_passages_walk() -> None:
    model = build("llama")
    memory = routing(model, "vector_db")
    assert memory.mode == "passage"
    run = files_that_run(lambda: chosen(model, [asked(2)]))
    assert paths_of("Follow a passage into generate()") <= run


def test_indexing_a_file_runs_the_files_of_its_walk(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "a.txt").write_text(TEXTS["a.txt"], encoding="utf-8")
    options = ("--store", tmp_path / "store", "--model", tmp_path / "model")
    run = files_that_run(lambda: emt("index", tmp_path / "a.txt", *options))
    assert paths_of("Follow a file into the store") <= run


def lines_of_the_tree() -> list[str]:
    return re.findall(r"^```\n(.*?)^```", section("The house"), flags=re.M | re.S)[0].splitlines()


def test_the_tree_has_every_part_of_both_packages_on_one_screen() -> None:
    lines = lines_of_the_tree()
    assert len(lines) <= 45
    for package in ("memory_backends", "emt"):
        assert set(named_in(lines, package)) == set(parts_of(ROOT / package))


def named_in(lines: list[str], package: str) -> Iterator[str]:
    """Yield the names that are indented under a package."""
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{package}/"))
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            return
        yield line.split()[0].rstrip("/")


def parts_of(package: Path) -> Iterator[str]:
    """Yield the subpackages of a package, and its modules but those that only give it a name."""
    for path in package.iterdir():
        is_module = path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py")
        if is_module or (path / "__init__.py").is_file():
            yield path.name
