"""Draw an experiment's results again, and write its summary, from `results.jsonl` alone.

python scripts/plot.py results/retrieval-smoke/results.jsonl [--output FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import one_line_errors
from experiments.interpretability import report as interpretability
from experiments.perplexity import report as perplexity
from experiments.results import read_results
from experiments.retrieval import plots, report
from experiments.timing import report as timing

from emt.errors import ConfigError

Header = Mapping[str, Any]
Items = Mapping[str, Mapping[str, Any]]

EXPERIMENTS: dict[
    str, tuple[Callable[[Header, Items], str], Callable[[Header, Items, Path], list[Path]]]
] = {
    "interpretability": (interpretability.summary, interpretability.draw),
    "perplexity": (perplexity.summary, perplexity.draw),
    "retrieval": (report.summary, plots.draw),
    "timing": (timing.summary, timing.draw),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write summary and pictures beside the results, or to another folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="a results.jsonl")
    parser.add_argument("--output", type=Path, help="a folder (default: that of the results)")
    given = parser.parse_args(arguments)
    folder = given.output or given.results.parent
    with one_line_errors():
        header, items = read_results(given.results)
        experiment = header["experiment"]
        if experiment not in EXPERIMENTS:
            raise ConfigError(
                f"'{given.results}' is of experiment '{experiment}', which has no plots; "
                f"{', '.join(EXPERIMENTS)} have."
            )
        summary, draw = EXPERIMENTS[experiment]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.md").write_text(summary(header, items), encoding="utf-8")
        for path in (folder / "summary.md", *draw(header, items, folder)):
            print(path)


if __name__ == "__main__":
    main()
