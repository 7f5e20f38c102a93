"""Run the `emt` command in this process, with a tiny model and documents in a folder."""

import contextlib
import io
import os
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
    found = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            found = end.code
    done = Done(found, out.getvalue(), err.getvalue())
    assert done.code == code, done
    return done


def emt_process(*arguments, code=0, **environment):
    """Run a command in a new process and expect an exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "emt", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
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
