"""Commands that are killed, or whose writes fail, at any step: every promise, every time.

After each attack a fresh look at the store must find every document that was reported as written,
no half of any, exact answers, nothing for `verify` to complain of, and no more bytes than before;
and the same command again must end where an uninterrupted run does. Run alone, a failure is found
again with its kind and number: the documents and the steps are always the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.emt.commands import make_documents, make_model
from tests.torture.attacks import Battle, Command, battle
from tests.torture.forks import Forks
from tests.torture.made_up import Goal
from tests.torture.promises import Content, contents, made_up

FIRST: Goal = {f"d{number}": 1 for number in range(6)}
# kept, replaced, removed, kept, replaced, removed, new
AGAIN: Goal = {"d0": 1, "d1": 2, "d2": None, "d3": 1, "d4": 2, "d5": None, "n1": 1, "n2": 1}
LESS: Goal = {"d1": None, "d4": None}
INDEX = "tests.torture.made_up.index"
CLI = "tests.torture.commands.index"
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


@pytest.fixture(scope="module")
def cli_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Give what runs jobs of the real command."""
    forks = Forks(tmp_path_factory.mktemp("cli-jobs"), "tests.torture.commands")
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def real(cli_forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`emt index` onto a store: one document kept, one replaced, two added."""
    folder = tmp_path_factory.mktemp("real")
    model = str(make_model(folder / "model"))
    documents = make_documents(folder / "documents")

    def store(name: str) -> Path:
        ended = cli_forks.run(CLI, str(folder / name), str(documents), model)
        assert ended.code == 0, ended
        return folder / name

    base = store("base")
    (documents / "b.md").write_text("w90 w80 w70 w60")
    (documents / "c.jsonl").rename(folder / "c.jsonl")  # stays in the store
    for name in ("d.txt", "e.txt"):
        (documents / name).write_text(
            " ".join(f"w{3 + ord(name[0]) % 7 * i % 90}" for i in range(40))
        )
    after = contents(base, index="auto") | contents(store("other"), index="auto")
    before = contents(base, index="auto")
    return Command(
        "emt index", CLI, (str(documents), model), base, before, after, False, "auto", 1e-5
    )


NAMES = ["first", "again", "remove", "compact", "rebuild"]


def fight(command: Command, forks: Forks, folder: Path, number: int) -> None:
    def make() -> Battle:
        return Battle(command, forks, folder, verify=True)

    tried, hits, failures = battle(make, number, seed=number)
    sys.stdout.write(f"{command.name}: {tried.total()} attacks; those that hit: {dict(hits)}\n")
    assert not failures, "\n".join(failures)
    assert hits["kill"] == tried["kill"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_files_are_on_the_disk_before_the_catalogue_speaks_of_them(
    name: str, commands: dict[str, Command], forks: Forks, tmp_path: Path
) -> None:
    assert Battle(commands[name], forks, tmp_path, verify=True).unsynced == []


@pytest.mark.parametrize("name", NAMES)
def test_a_few_kills(name: str, commands: dict[str, Command], forks: Forks, tmp_path: Path) -> None:
    fight(commands[name], forks, tmp_path, number=5)


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES)
def test_many_kills(name: str, commands: dict[str, Command], forks: Forks, tmp_path: Path) -> None:
    fight(commands[name], forks, tmp_path, number=100)


@pytest.mark.torture
def test_many_kills_of_the_real_command(real: Command, cli_forks: Forks, tmp_path: Path) -> None:
    fight(real, cli_forks, tmp_path, number=50)
