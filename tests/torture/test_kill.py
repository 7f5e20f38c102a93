"""Commands that are killed, or whose writes fail, at any step: every promise, every time.

After each attack a fresh look at the store must find every document that was reported as written,
no half of any, exact answers, nothing for `verify` to complain of, and no more bytes than before;
and the same command again must end where an uninterrupted run does. Run alone, a failure is found
again with its kind and number: the documents and the steps are always the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import memory_backends
from memory_backends import VectorDBBackend
from tests.torture.attacks import Battle, Command, battle
from tests.torture.forks import Forks
from tests.torture.made_up import Goal
from tests.torture.promises import Content, made_up

CAN_VERIFY = hasattr(memory_backends, "verify")

FIRST: Goal = {f"d{number}": 1 for number in range(6)}
# kept, replaced, removed, kept, replaced, removed, new
AGAIN: Goal = {"d0": 1, "d1": 2, "d2": None, "d3": 1, "d4": 2, "d5": None, "n1": 1, "n2": 1}
LESS: Goal = {"d1": None, "d4": None}
INDEX = "tests.torture.made_up.index"
TIDY = "tests.torture.made_up.tidy"


def of(*goals: Goal) -> Mapping[str, Content]:
    """Return what is in a store after one goal after another."""
    versions = {name: version for goal in goals for name, version in goal.items()}
    return {
        name: made_up(name, version) for name, version in versions.items() if version is not None
    }


@pytest.fixture(scope="module")
def commands(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str, *goals: Goal) -> Path:
        for goal in goals:
            ended = forks.run(INDEX, str(folder / name), goal)
            assert (ended.code, ended.lines) == (0, [*goal, "saved"]), ended
        return folder / name

    first = base("first", FIRST)
    holes = base("holes", FIRST, AGAIN)
    full, less, mixed = of(FIRST), of(FIRST, LESS), of(FIRST, AGAIN)
    return {
        command.name: command
        for command in (
            Command("first", INDEX, (FIRST,), None, {}, full),
            Command("again", INDEX, (AGAIN,), first, full, mixed),
            Command("remove", INDEX, (LESS,), first, full, less),
            Command("compact", TIDY, ("compact",), holes, mixed, mixed, reports=False),
            Command("rebuild", TIDY, ("rebuild",), holes, mixed, mixed, reports=False),
        )
    }


NAMES = [
    "first",
    "again",
    "remove",
    *(
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not hasattr(VectorDBBackend, name), reason=f"{name}() is not there yet"
            ),
        )
        for name in ("compact", "rebuild")
    ),
]


def fight(name: str, commands: dict[str, Command], forks: Forks, folder: Path, number: int) -> None:
    def make() -> Battle:
        return Battle(commands[name], forks, folder, verify=CAN_VERIFY)

    tried, hits, failures = battle(make, number, seed=number)
    sys.stdout.write(f"{name}: {tried.total()} attacks; those that hit: {dict(hits)}\n")
    assert not failures, "\n".join(failures)
    assert hits["kill"] == tried["kill"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_few_kills(name: str, commands: dict[str, Command], forks: Forks, tmp_path: Path) -> None:
    fight(name, commands, forks, tmp_path, number=5)


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES)
def test_many_kills(name: str, commands: dict[str, Command], forks: Forks, tmp_path: Path) -> None:
    fight(name, commands, forks, tmp_path, number=300)
