""""""

from experiments.timing.report import draw, summary
from experiments.timing.run import run_timing as run
from experiments.timing.settings import TimingSettings as Settings

__all__ = ["Settings", "draw", "run", "summary"]
