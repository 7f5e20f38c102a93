"""What the experiments' commands have in common: options, one line for a mistake, a report.

python scripts/run_X.py --base configs/experiments/X.yaml [--preset smoke] [--set key=value]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from experiments.results import Results
from experiments.settings import load_settings

from emt.attach import attach
from emt.cli import quiet
from emt.config import MemoryConfig
from emt.errors import ConfigError, EMTError
from emt.memory.memory import Memory
from emt.model.loading import LoadedModel, load

T = TypeVar("T")
M = TypeVar("M", bound="_OfModel")
Header = Mapping[str, Any]
Items = Mapping[str, Mapping[str, Any]]


class _OfModel(Protocol):
    """Settings that name a model."""

    @property
    def model(self) -> str:
        """What `load` takes."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def options(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `output` is a folder named after the settings if it is not given."""
    parser = _Parser(description=description)
    parser.add_argument("--base", required=True, type=Path, help="settings in YAML")
    parser.add_argument("--preset", help="a named set of changes in that file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="KEY=VALUE",
        help="change a setting; the value is YAML; KEY.INNER=VALUE inside of a mapping",
    )
    parser.add_argument("--model", help="a folder, hub name or .gguf file; as --set model=...")
    parser.add_argument("--output", type=Path, help="a folder for results; goes on if they exist")
    found = parser.parse_args(arguments)
    if found.output is None:
        found.output = Path("results") / "-".join(filter(None, (found.base.stem, found.preset)))
    return found


def settings(kind: type[T], found: argparse.Namespace) -> T:
    """Make settings of what the command line says.

    Raises:
        ConfigError: something is wrong with them.
    """
    model = [] if found.model is None else [f"model={found.model}"]
    return load_settings(kind, found.base, preset=found.preset, changes=[*found.changes, *model])


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End with one line and code 2 after a mistake of the user's."""
    try:
        yield
    except EMTError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted. The same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None


def report(
    results: Results,
    folder: Path,
    summary: Callable[[Header, Items], str],
    draw: Callable[[Header, Items, Path], Sequence[Path]],
) -> None:
    """Write the summary and the pictures beside the results, and print the summary."""
    text = summary(results.header, results.items)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    draw(results.header, results.items, folder)
    print(f"in '{folder}'")


def run(
    description: str,
    kind: type[M],
    measure: Callable[[M, LoadedModel, Path], Results],
    summary: Callable[[Header, Items], str],
    draw: Callable[[Header, Items, Path], Sequence[Path]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run an experiment that needs a model, from the command line to the report.

    Args:
        description: the command's; its first line is shown by --help.
        kind: of settings.
        measure: takes these, the model they name and a results file, and returns what was found.
        summary: of what was found, in Markdown.
        draw: puts pictures of it into a folder.
        arguments: instead of the command line's.
    """
    given = options(description.partition("\n")[0], arguments)
    with one_line_errors():
        asked = settings(kind, given)
        with quiet():
            loaded = load(asked.model)
        results = measure(asked, loaded, given.output / "results.jsonl")
        report(results, given.output, summary, draw)


def remembering(model: str, store: Path) -> tuple[LoadedModel, Memory]:
    """Load a model, and attach a store to it in passage mode, with its heads indexed.

    Raises:
        ConfigError: there is no store, or no head profile of the model.
    """
    if not store.is_dir():
        raise ConfigError(f"there is no store '{store}'. Make it with `emt index`.")
    with quiet():
        loaded = load(model)
    config = MemoryConfig(mode="passage", memory_type="vector_db", path=str(store))
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    memory.save()
    return loaded, memory
