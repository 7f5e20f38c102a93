"""One byte of a store is damaged: it is found, or nothing that anyone can see has changed.

Every file has its share of flips, its first bytes half of them, the catalogue a larger one. Damage
may be named by `verify`, or refused with an error of ours when the store is used, or change nothing
that is observable. It may not go unseen, raise anything else, or end the process.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

import memory_backends
from tests.torture.forks import Forks

FLIPS = "tests.torture.flips"
_HEADER = 128  # bytes
_BATCH = 50

Flip = tuple[str, int, int]  # file, offset, bits to turn


@pytest.fixture(scope="module")
def store(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flips") / "store"
    assert forks.run(f"{FLIPS}.make", str(path)).code == 0
    return path


def choose(store: Path, number: int, rng: random.Random) -> list[Flip]:
    files = sorted(f for f in store.rglob("*") if f.is_file() and f.stat().st_size)
    shares = {file: 4 if file.suffix == ".sqlite" else 1 for file in files}
    flips = []
    for file, share in shares.items():
        size = file.stat().st_size
        for turn in range(-(-number * share // sum(shares.values()))):
            offset = rng.randrange(min(size, _HEADER) if turn % 2 else size)
            name = file.relative_to(store).as_posix()
            flips.append((name, offset, rng.randrange(1, 256)))
    rng.shuffle(flips)
    return flips


def judge(forks: Forks, store: Path, folder: Path, flips: list[Flip]) -> list[str]:
    """Return a verdict for each flip; a child that dies has one for the flip that it died of."""
    verdicts: list[str] = []
    while len(verdicts) < len(flips):
        first = len(verdicts)
        batch = flips[first : first + _BATCH]
        ended = forks.run(f"{FLIPS}.damage", str(store), str(folder), batch)
        verdicts += [
            line.removeprefix("verdict ") for line in ended.lines if line.startswith("verdict ")
        ]
        if ended.code != 0:
            assert ended.lines[-1] == f"trying {len(verdicts) - first}", ended
            verdicts.append(f"killed the process: {ended.code}")
    return verdicts


def flip(forks: Forks, store: Path, folder: Path, number: int, seed: int) -> None:
    flips = choose(store, number, random.Random(seed))
    verdicts = judge(forks, store, folder, flips)
    assert len(verdicts) == len(flips) >= number
    sys.stdout.write(f"{len(flips)} flips: {dict(Counter(verdicts))}\n")
    broken = [
        f"{name} at byte {offset}, bits {mask:#04x}: {verdict}"
        for (name, offset, mask), verdict in zip(flips, verdicts, strict=True)
        if verdict not in ("named", "refused", "harmless")
    ]
    assert not broken, f"{len(broken)} of {len(flips)}:\n" + "\n".join(sorted(broken))
    for name in {name for name, _, _ in flips}:  # no file may be all harmless: it is not looked at
        own = [v for (other, _, _), v in zip(flips, verdicts, strict=True) if other == name]
        assert "named" in own, f"verify never named {name}: {Counter(own)}"


def test_an_undamaged_store_has_no_damage(store: Path) -> None:
    assert memory_backends.verify(store) == []


def test_a_few_flips(forks: Forks, store: Path, tmp_path: Path) -> None:
    flip(forks, store, tmp_path, number=60, seed=1)


@pytest.mark.torture
def test_many_flips(forks: Forks, store: Path, tmp_path: Path) -> None:
    flip(forks, store, tmp_path, number=1200, seed=2)
