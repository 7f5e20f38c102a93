"""Counterfactual retrieval: documents in the prompt, in memory, or retrieved in chunks.

    python scripts/run_retrieval.py --base configs/experiments/retrieval.yaml --preset smoke

Writes results.jsonl, summary.md and two pictures to the output folder. Stopped, the same command
goes on from there. `configs/experiments/many_documents.yaml` asks one memory of many documents.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import one_line_errors, options, report, settings
from experiments.retrieval.answering import Responder
from experiments.retrieval.experiment import loaded, run_retrieval
from experiments.retrieval.plots import draw
from experiments.retrieval.report import summary
from experiments.retrieval.settings import RetrievalSettings

from emt.cli import quiet


def load_quietly(asked: RetrievalSettings) -> Responder:
    """Load the model without its progress bars in a pipe."""
    with quiet():
        return loaded(asked)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, then say what was found."""
    given = options(__doc__.partition("\n")[0], arguments)
    with one_line_errors():
        asked = settings(RetrievalSettings, given)
        results = run_retrieval(asked, given.output, loading=load_quietly)
        report(results, given.output, summary, draw)


if __name__ == "__main__":
    main()
