"""What the commands have in common: one line for a mistake, and a report of results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from emt.attach import attach
from emt.cli import quiet
from emt.config import MemoryConfig
from emt.errors import ConfigError, EMTError
from emt.memory.memory import Memory
from emt.model.loading import LoadedModel, load
from experiments.registry import experiment_of
from experiments.results import Header, Items


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line and code 2 after a mistake of the user's."""
    try:
        yield
    except EMTError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted. The same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None


def write_report(header: Header, items: Items, folder: Path) -> list[Path]:
    """Write `summary.md` and the plots of some results into a folder; return the files.

    Raises:
        ConfigError: there are no results, or they are of an unknown experiment.
    """
    report = experiment_of(header["experiment"]).report
    if not items:
        raise ConfigError("there are no results yet. Run the experiment first.")
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "summary.md"
    summary.write_text(report.summary(header, items), encoding="utf-8")
    return [summary, *report.draw(header, items, folder)]


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
