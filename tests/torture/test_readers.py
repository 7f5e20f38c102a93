"""Readers see whole states of a store, one after another, while a writer changes it.

The writer says when each change began and ended, the readers when they refreshed and what they then
found. What a reader finds must have been in the store at a moment of its refresh.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.torture.forks import Forks

CROWD = "tests.torture.crowd"
FIRST = {("d0", 0), ("d1", 0), ("d2", 0)}  # what `fill` makes


class Change(NamedTuple):
    """One document's change: from when on it may be seen, and by when it must be."""

    began: float
    ended: float
    version: int | None


def states(changes: Iterable[Change], began: float, ended: float) -> set[int | None]:
    """Return the versions of one document that a look between two moments may find."""
    possible: set[int | None] = set()
    for change in changes:
        if change.ended < began:
            possible = {change.version}  # was done before the look began: nothing older
        elif change.began <= ended:
            possible.add(change.version)
    return possible


def test_what_a_look_may_find() -> None:
    changes = [Change(0, 0, None), Change(1, 2, 5), Change(4, 6, None), Change(8, 9, 7)]
    assert states(changes, 0.5, 0.7) == {None}
    assert states(changes, 0.5, 1.5) == {None, 5}
    assert states(changes, 3.0, 3.5) == {5}
    assert states(changes, 3.0, 10) == {5, None, 7}
    assert states(changes, 9.5, 10) == {7}


def race(forks: Forks, folder: Path, seconds: float, rounds: int) -> None:
    store = folder / "store"
    assert forks.run(f"{CROWD}.fill", str(store)).code == 0
    names = {f"d{number}" for number in range(8)}
    start = {name: Change(0, 0, dict(FIRST).get(name)) for name in names}
    changes = {name: [change] for name, change in start.items()}
    looks = 0
    for number in range(rounds):
        writer = forks.start(f"{CROWD}.write", str(store), seconds, number)
        readers = [
            forks.start(f"{CROWD}.read", str(store), seconds, 10 * number + reader)
            for reader in range(3)
        ]
        wrote = forks.wait(writer)
        read = [forks.wait(reader) for reader in readers]
        assert [done.code for done in (wrote, *read)] == [0] * 4, (wrote.err, [r.err for r in read])
        for began, ended, _, name, version in map(json.loads, wrote.lines):
            changes[name].append(Change(began, ended, version))
        for began, ended, seen in (json.loads(line) for done in read for line in done.lines):
            looks += 1
            first, *later = [{tuple(key) for key in documents} for documents in seen]
            for name in names:
                versions = {version for other, version in first if other == name} or {None}
                assert len(versions) == 1, f"two versions of {name} at once: {first}"
                assert versions <= states(changes[name], began, ended), (name, began, ended, first)
            for documents in later:  # nothing changes without a refresh
                assert documents == first
    written = sum(map(len, changes.values())) - len(names)
    sys.stdout.write(f"{written} changes, {looks} looks\n")
    assert written >= 3 * seconds * rounds
    assert looks >= 3 * seconds * rounds


def test_readers_see_whole_states(forks: Forks, tmp_path: Path) -> None:
    race(forks, tmp_path, seconds=3, rounds=1)


@pytest.mark.torture
def test_readers_see_whole_states_for_long(forks: Forks, tmp_path: Path) -> None:
    race(forks, tmp_path, seconds=10, rounds=4)
