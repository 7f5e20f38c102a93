"""Perplexity over length, with older text as memories: see configs/experiments/perplexity.yaml.

    python scripts/run_perplexity.py --base configs/experiments/perplexity.yaml [--preset smoke]

Run it again to go on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import one_line_errors, options, report, settings

from emt.cli import quiet
from emt.experiments.perplexity.experiment import run_perplexity
from emt.experiments.perplexity.report import draw, summary
from emt.experiments.perplexity.settings import PerplexitySettings
from emt.loading import load


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then say what was found."""
    given = options(__doc__.partition("\n")[0], arguments)
    with one_line_errors():
        asked = settings(PerplexitySettings, given)
        with quiet():
            loaded = load(asked.model)
        results = run_perplexity(asked, loaded, given.output / "results.jsonl")
        report(results, given.output, summary, draw)


if __name__ == "__main__":
    main()
