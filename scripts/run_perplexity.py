"""Perplexity over length, with older text as memories: see configs/experiments/perplexity.yaml.

    python scripts/run_perplexity.py --base configs/experiments/perplexity.yaml [--preset smoke]

Run it again to go on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import run
from experiments.perplexity.experiment import run_perplexity
from experiments.perplexity.report import draw, summary
from experiments.perplexity.settings import PerplexitySettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then say what was found."""
    run(__doc__, PerplexitySettings, run_perplexity, summary, draw, arguments)


if __name__ == "__main__":
    main()
