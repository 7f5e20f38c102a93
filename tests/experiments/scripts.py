"""The experiments' commands, run in this process as `python scripts/NAME.py` would."""

import contextlib
import importlib
import io
import sys
from dataclasses import dataclass
from unittest.mock import patch

from tests.emt.commands import ROOT


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run_script(name, *arguments):
    """Run a script from the repository's root."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with (
            contextlib.chdir(ROOT),
            patch.object(sys, "path", [str(ROOT / "scripts"), *sys.path]),
            patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            importlib.import_module(name).main()
    except SystemExit as end:
        code = end.code
    return Done(code or 0, out.getvalue(), err.getvalue())
