"""A process that has imported everything and forks a child for each job.

So a process that is killed costs milliseconds, not the seconds that importing torch takes, and a
test can afford to kill one at every step.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.torture.faults import Fault

ROOT = Path(__file__).parent.parent.parent
_LONGEST_JOB = 120  # seconds, after which a child is a failure


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        code: its exit code, or minus the signal that killed it.
        lines: what it said, in whole lines.
        err: what it wrote to stderr.
    """

    code: int
    lines: list[str]
    err: str


class Job(NamedTuple):
    """A child that runs."""

    pid: int
    out: Path


class Forks:
    """Start, kill and await children, each running one function of `modules` and no more."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self._folder = folder
        self._jobs = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.forks", *modules],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, function: str, *arguments: Any, fault: Fault | None = None) -> Job:
        """Run "module.function" with plain arguments in a child."""
        self._jobs += 1
        out = self._folder / f"job-{self._jobs}"
        for path in (out, out.with_suffix(".err")):  # the child may die before it has made them
            path.touch()
        pid = self._ask("start", function, arguments, fault, str(out))
        return Job(pid, out)

    def wait(self, job: Job) -> Ended:
        """Wait for a child to end, and return how it did."""
        code = self._ask("wait", job.pid)
        said = job.out.read_text()
        err = job.out.with_suffix(".err").read_text()
        return Ended(code, said[: said.rfind("\n") + 1].splitlines(), err)

    def run(self, function: str, *arguments: Any, fault: Fault | None = None) -> Ended:
        """Run a job to its end."""
        return self.wait(self.start(function, *arguments, fault=fault))

    def stop_after(self, seconds: float, number: int, function: str, *arguments: Any) -> Ended:
        """Run a job and send it a signal after a while, if it has not ended before."""
        job = self.start(function, *arguments)
        time.sleep(seconds)
        os.kill(job.pid, number)
        return self.wait(job)

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)
        assert self._server.stdout is not None
        self._server.stdout.close()

    def _ask(self, *request: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(json.loads(self._server.stdout.readline()))


def _serve(modules: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child listens while it is at its job
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        if what == "start":
            answer = os.fork()
            if not answer:
                _run(*arguments)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(arguments[0], 0)[1])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _run(function: str, arguments: list[Any], fault: list[Any] | None, out: str) -> NoReturn:
    """Be the child: never return."""
    signal.alarm(_LONGEST_JOB)
    for target, path in ((0, os.devnull), (1, out), (2, f"{out}.err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), target)
    code = 1
    try:
        module, name = function.rsplit(".", 1)
        job = getattr(importlib.import_module(module), name)
        if fault is not None:
            Fault(*fault).install()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = job(*arguments) or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
