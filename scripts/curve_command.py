"""What `run_perplexity.py` and `run_timing.py` have in common: options, and errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from emt.cli import quiet
from emt.errors import EMTError
from emt.experiments.results import Results
from emt.experiments.settings import load_settings
from emt.loading import LoadedModel, load

T = TypeVar("T")
Items = Mapping[str, Mapping[str, Any]]


def run(
    name: str,
    kind: type[T],
    measure: Callable[[T, LoadedModel, Path], Results],
    summary: Callable[[Mapping[str, Any], Items], str],
    plot: Callable[[Mapping[str, Any], Items, Path], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run an experiment; write `results.jsonl`, `summary.md` and `NAME.png`; print the summary.

    An error of the user's is one line on stderr and exit code 2.
    """
    options = _options(name, arguments)
    folder = Path(options.output or f"results/{name}-{options.preset or 'base'}")
    changes = [*options.set, *([f"model={options.model}"] if options.model else [])]
    try:
        settings = load_settings(kind, options.base, preset=options.preset, changes=changes)
        with quiet():
            loaded = load(settings.model)
        results = measure(settings, loaded, folder / "results.jsonl")
    except EMTError as error:
        _fail(name, str(error))
    except KeyboardInterrupt:
        _fail(name, "interrupted. Run the same command again to go on.", code=130)
    text = summary(results.header, results.items)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    plot(results.header, results.items, folder / f"{name}.png")
    print(text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _fail(self.prog, f"{message} (see --help)")


def _options(name: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog=f"run_{name}.py")
    parser.add_argument("--base", default=f"configs/experiments/{name}.yaml", help="settings")
    parser.add_argument("--preset", help="a named set of changes in the settings file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    parser.add_argument("--model", help="the same as --set model=")
    parser.add_argument("--output", help=f"a folder; results/{name}-PRESET if not given")
    return parser.parse_args(arguments)


def _fail(name: str, message: str, code: int = 2) -> NoReturn:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
