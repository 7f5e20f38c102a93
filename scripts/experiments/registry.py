"""The experiments, by the name that settings and results give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emt.errors import ConfigError
from emt.model.loading import LoadedModel
from experiments import interpretability, perplexity, retrieval, routing, timing
from experiments.results import Header, Items, Results
from experiments.settings import Settings

Loading = Callable[[], LoadedModel]


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        settings: what it is asked to do.
        run: takes settings, the output folder and what loads the model; adds to `results.jsonl`
            what it does not have yet.
        summary: makes the results into Markdown.
        draw: makes the results into plots in a folder, and returns the files.
    """

    settings: type[Settings]
    run: Callable[[Any, Path, Loading], Results]
    summary: Callable[[Header, Items], str]
    draw: Callable[[Header, Items, Path], list[Path]]


EXPERIMENTS = {
    module.__name__.rpartition(".")[2]: Experiment(
        module.Settings, module.run, module.summary, module.draw
    )
    for module in (retrieval, perplexity, timing, interpretability, routing)
}


def experiment_of(name: Any) -> Experiment:
    """Return an experiment by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"experiment must be one of {', '.join(EXPERIMENTS)}; got {name!r}.")
    return EXPERIMENTS[name]
