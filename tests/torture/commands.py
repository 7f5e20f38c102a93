"""A job that is `emt index`, in a process that has imported it already."""

from __future__ import annotations

import contextlib
import io

from emt.cli import main
from tests.torture.made_up import say


def index(store: str, documents: str, model: str) -> int:
    """Run the command; say the error that it ends with, if it does."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main(["index", documents, "--store", store, "--model", model])
        except SystemExit as end:
            say(f"error {err.getvalue().splitlines()[-1]}")
            return int(end.code or 0)
    return 0
