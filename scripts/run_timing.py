"""Seconds a query over the number of queries on one document: see configs/experiments/timing.yaml.

    python scripts/run_timing.py --base configs/experiments/timing.yaml [--preset smoke]

Run it again to go on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import one_line_errors, options, report, settings

from emt.cli import quiet
from emt.experiments.timing.experiment import run_timing
from emt.experiments.timing.report import draw, summary
from emt.experiments.timing.settings import TimingSettings
from emt.loading import load


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then say what was found."""
    given = options(__doc__.partition("\n")[0], arguments)
    with one_line_errors():
        asked = settings(TimingSettings, given)
        with quiet():
            loaded = load(asked.model)
        results = run_timing(asked, loaded, given.output / "results.jsonl")
        report(results, given.output, summary, draw)


if __name__ == "__main__":
    main()
