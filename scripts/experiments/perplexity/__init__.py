""""""

from experiments.perplexity.report import draw, summary
from experiments.perplexity.run import run_perplexity as run
from experiments.perplexity.settings import PerplexitySettings as Settings

__all__ = ["Settings", "draw", "run", "summary"]
