"""A command under fire: what may be on the disk after it was killed, and after it ran again."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from memory_backends import EMTError
from memory_backends.store.directory import has_no_store
from tests.torture.faults import Fault, Kind
from tests.torture.forks import Ended, Forks
from tests.torture.promises import Content, check_allowed, check_undamaged, contents, size_of

_SLACK = 20_480  # bytes by which a store may differ in size: a few pages of SQLite
_CODES = {  # 0 is one of each: a fault may hit nothing, or only what is not needed
    "kill": -signal.SIGKILL,
    "kill any time": -signal.SIGKILL,
    "kill at limit": -signal.SIGXFSZ,
    "Ctrl-C at": 130,
    "Ctrl-C any time": 130,
}
_SIGNALS = {"kill any time": signal.SIGKILL, "Ctrl-C any time": signal.SIGINT}


class Attack(NamedTuple):
    """One thing that goes wrong: a fault and its step or limit, or a signal and milliseconds."""

    kind: str
    at: int


@dataclass(frozen=True)
class Command:
    """What runs, from what, to what.

    Attributes:
        function, arguments: the job; its first argument is the store's path, put before these.
        base: the store that it starts from; None for nothing.
        before: what is in `base`.
        after: what is to be in the store in the end.
        reports: whether the job names each document once it is done.
        index: the factory string that its answers are checked with.
        atol: by how much rows may differ from the expected.
    """

    name: str
    function: str
    arguments: tuple[Any, ...]
    base: Path | None
    before: Mapping[str, Content]
    after: Mapping[str, Content]
    reports: bool = True
    index: str = "Flat"
    atol: float = 0


class Battle:
    """Attacks a command, and checks every promise each time."""

    def __init__(self, command: Command, forks: Forks, folder: Path, *, verify: bool) -> None:
        self._command, self._forks, self._folder = command, forks, folder
        self._verify = verify
        self._stores = 0
        store = self._fresh_store()
        assert self._run(store).code == 0
        self._check(store, [command.after])
        self.size = size_of(store)
        self.largest_file = max(f.stat().st_size for f in store.rglob("*") if f.is_file())
        started = time.perf_counter()
        counted = self._run(self._fresh_store(), "count", 0)
        self.seconds = time.perf_counter() - started
        assert counted.code == 0, counted
        self.steps = int(counted.lines[-1].removeprefix("steps "))
        self.unsynced = sorted({line for line in counted.lines if line.startswith("unsynced ")})

    def attacks(self, number: int, rng: random.Random) -> Iterator[Attack]:
        """Choose attacks of all kinds, spread over all steps and bytes and the whole time."""
        steps, size = self.steps, self.largest_file
        for kind, share, span in (
            ("kill", 0.35, (1, steps)),
            ("Ctrl-C at", 0.15, (1, steps)),
            ("kill any time", 0.1, (0, round(1000 * self.seconds))),
            ("Ctrl-C any time", 0.05, (0, round(1000 * self.seconds))),
            ("once", 0.15, (1, steps)),
            ("full", 0.1, (1, steps)),
            ("limit", 0.05, (400, size)),
            ("kill at limit", 0.05, (400, size)),
        ):
            for at in _spread(*span, max(round(share * number), 1), rng):
                yield Attack(kind, at)

    def fight(self, attack: Attack) -> int:
        """Attack once, check what is left, run again, check that all is there; return the code."""
        command = self._command
        store = self._fresh_store()
        number = _SIGNALS.get(attack.kind)
        if number is not None:
            arguments = (str(store), *command.arguments)
            ended = self._forks.stop_after(attack.at / 1000, number, command.function, *arguments)
        else:
            ended = self._run(store, attack.kind, attack.at)
        assert ended.code in (0, _CODES.get(attack.kind, 2)), ended
        if ended.code == 2:  # one line, which says where
            assert ended.lines[-1].startswith("error ")
            assert str(store) in ended.lines[-1], ended
        self._check(store, [command.before, command.after], done=set(ended.lines))
        again = self._run(store)
        assert again.code == 0, again
        self._check(store, [command.after])
        assert size_of(store) <= self.size + _SLACK
        shutil.rmtree(store)
        return ended.code

    def _run(self, store: Path, kind: str | None = None, at: int = 0) -> Ended:
        fault = None if kind is None else Fault(_kind(kind), at, str(store))
        return self._forks.run(
            self._command.function, str(store), *self._command.arguments, fault=fault
        )

    def _check(
        self,
        store: Path,
        states: list[Mapping[str, Content]],
        done: set[str] | None = None,
    ) -> None:
        """Expect each document to be in one of `states`; in the last, if it is done."""
        command = self._command
        names = dict.fromkeys(name for state in states for name in state)
        reported = (done or set()) if command.reports else set()
        allowed = {
            name: [state.get(name) for state in (states[-1:] if name in reported else states)]
            for name in names
        }
        if has_no_store(store):
            check_allowed({}, allowed)
            return
        if self._verify:
            check_undamaged(store)
        check_allowed(contents(store, index=command.index), allowed, atol=command.atol)

    def _fresh_store(self) -> Path:
        self._stores += 1
        store = self._folder / f"store-{self._stores}"
        if self._command.base is not None:
            shutil.copytree(self._command.base, store)
        return store


def battle(
    make: Callable[[], Battle], number: int, seed: int
) -> tuple[Counter[str], Counter[str], list[str]]:
    """Fight many attacks; return how many there were and how many hit, by kind, and what failed."""
    ground = make()
    tried: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    failures = []
    for attack in ground.attacks(number, random.Random(seed)):
        tried[attack.kind] += 1
        try:
            code = ground.fight(attack)
        except (AssertionError, EMTError) as error:
            failures.append(f"{attack}: {error}")
        else:
            hits[attack.kind] += code != 0
    return tried, hits, failures


def _kind(kind: str) -> Kind:
    return kind  # type: ignore[return-value]


def _spread(first: int, last: int, number: int, rng: random.Random) -> list[int]:
    """Choose numbers from `first` to `last`, one at random in each of as many equal parts."""
    width = (last + 1 - first) / number
    return sorted({int(first + (part + rng.random()) * width) for part in range(number)})
