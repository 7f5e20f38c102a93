"""Run the `emt` command in this process, with a tiny model and documents in a folder."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from emt.cli import main
from tests.emt.words import word_tokenizer
from tests.families import build

ROOT = Path(__file__).parent.parent.parent


def _lines(first, stop):
    return "\n".join(
        " ".join(f"w{number}" for number in range(start, start + 10))
        for start in range(first, stop, 10)
    )


TEXTS = {"a.txt": _lines(5, 35), "b.md": _lines(35, 55), "c": _lines(55, 95)}


class Done(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


class _Screen(io.StringIO):
    def isatty(self):
        return True


def emt(*arguments, code=0, terminal=False):
    """Run a command in this process and expect an exit code."""
    out, err = io.StringIO(), _Screen() if terminal else io.StringIO()
    exit_code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            exit_code = end.code
    done = Done(exit_code, out.getvalue(), err.getvalue())
    assert done.code == code, done
    return done


def emt_json(*arguments):
    """Run a command that prints one object on one line, and return that."""
    done = emt(*arguments, "--json")
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def refused(*arguments, message):
    """Run a command; expect exit code 2, nothing but one line on stderr, and a pattern in it."""
    done = emt(*arguments, code=2)
    assert done.out == ""
    lines = done.err.splitlines()
    if re.match(r"\d+ documents?, ", lines[0]):  # the estimate
        del lines[0]
    assert len(lines) == 1, done.err
    assert re.match(f"emt: .*{message}", lines[0]), lines[0]


def contents(folder):
    """Return what is in a folder, without locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "write.lock"
    }


_ONE_BY_ONE = """
import json, runpy, sys
for sys.argv[1:] in json.loads(sys.argv[1]):
    runpy.run_module("emt", run_name="__main__")
"""


def emt_process(*commands, code=0):
    """Run commands one by one in a new process, as `python -m emt`; expect its exit code."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _ONE_BY_ONE,
            json.dumps([list(map(str, each)) for each in commands]),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == code, done
    return Done(done.returncode, done.stdout, done.stderr)


def make_model(folder, model_type="llama", **options):
    """Save a tiny model and the tokenizer of words; return the folder."""
    build(model_type, **options).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def make_documents(folder):
    """Write `TEXTS` to a .txt, a .md and a .jsonl file; return the folder."""
    folder.mkdir(parents=True)
    for name in ("a.txt", "b.md"):
        (folder / name).write_text(TEXTS[name])
    text = TEXTS["c"].replace("\n", "\\n")
    (folder / "c.jsonl").write_text(f'{{"id": "c", "text": "{text}"}}\n')
    return folder
