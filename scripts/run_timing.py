"""Seconds a query over the number of queries on one document: see configs/experiments/timing.yaml.

    python scripts/run_timing.py --base configs/experiments/timing.yaml [--preset smoke]

Run it again to go on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import run
from experiments.timing.experiment import run_timing
from experiments.timing.report import draw, summary
from experiments.timing.settings import TimingSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then say what was found."""
    run(__doc__, TimingSettings, run_timing, summary, draw, arguments)


if __name__ == "__main__":
    main()
