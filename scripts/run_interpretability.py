"""Interpretability: what memories are attended to, and how answers change with their number.

    python scripts/run_interpretability.py --base configs/experiments/interpretability.yaml \
        [--preset smoke] [--set items=FILE]

Writes results.jsonl, summary.md, stability.png and attention_mass.png into --output. When it was
interrupted, the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import one_line_errors, options, report, settings

from emt.cli import quiet
from emt.experiments.interpretability.experiment import run_interpretability
from emt.experiments.interpretability.report import draw, summary
from emt.experiments.interpretability.settings import InterpretabilitySettings
from emt.loading import load


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, then say what was found."""
    given = options(__doc__.partition("\n")[0], arguments)
    with one_line_errors():
        asked = settings(InterpretabilitySettings, given)
        with quiet():
            loaded = load(asked.model)
        results = run_interpretability(asked, given.output, loaded=loaded)
        report(results, given.output, summary, draw)
    print(f"in '{given.output}'")


if __name__ == "__main__":
    main()
