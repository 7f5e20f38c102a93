"""Interpretability: what memories are attended to, and how answers change with their number.

    python scripts/run_interpretability.py --base configs/experiments/interpretability.yaml \
        [--preset smoke] [--set items=FILE]

Writes results.jsonl, summary.md, stability.png and attention_mass.png into --output. When it was
interrupted, the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import run
from experiments.interpretability.experiment import run_interpretability
from experiments.interpretability.report import draw, summary
from experiments.interpretability.settings import InterpretabilitySettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, then say what was found."""
    run(__doc__, InterpretabilitySettings, run_interpretability, summary, draw, arguments)


if __name__ == "__main__":
    main()
