"""The experiments, by the name that settings and results give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from emt.errors import ConfigError
from emt.model.loading import LoadedModel
from experiments.comparison import report as comparison
from experiments.comparison.run import run_comparison
from experiments.comparison.settings import ComparisonSettings
from experiments.interpretability import report as interpretability
from experiments.interpretability.run import run_interpretability
from experiments.interpretability.settings import InterpretabilitySettings
from experiments.perplexity import report as perplexity
from experiments.perplexity.run import run_perplexity
from experiments.perplexity.settings import PerplexitySettings
from experiments.results import Results
from experiments.retrieval import report as retrieval
from experiments.retrieval.run import run_retrieval
from experiments.retrieval.settings import RetrievalSettings
from experiments.settings import Settings
from experiments.timing import report as timing
from experiments.timing.run import run_timing
from experiments.timing.settings import TimingSettings

Loading = Callable[[], LoadedModel]


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        settings: what it is asked to do.
        run: takes settings, the output folder and what loads the model; adds to `results.jsonl` in
            that folder what it does not have yet.
        report: its functions `summary(header, items)`, which makes results into Markdown, and
            `draw(header, items, folder)`, which makes them into plots and returns the files.
    """

    settings: type[Settings]
    run: Callable[[Any, Path, Loading], Results]
    report: ModuleType


EXPERIMENTS = {
    "comparison": Experiment(ComparisonSettings, run_comparison, comparison),
    "retrieval": Experiment(RetrievalSettings, run_retrieval, retrieval),
    "perplexity": Experiment(PerplexitySettings, run_perplexity, perplexity),
    "timing": Experiment(TimingSettings, run_timing, timing),
    "interpretability": Experiment(
        InterpretabilitySettings, run_interpretability, interpretability
    ),
}


def experiment_of(name: Any) -> Experiment:
    """Return an experiment by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"experiment must be one of {', '.join(EXPERIMENTS)}; got {name!r}.")
    return EXPERIMENTS[name]
