""""""

from experiments.interpretability.report import draw, summary
from experiments.interpretability.run import run_interpretability as run
from experiments.interpretability.settings import InterpretabilitySettings as Settings

__all__ = ["Settings", "draw", "run", "summary"]
