""""""

from experiments.routing.report import draw, summary
from experiments.routing.run import run_routing as run
from experiments.routing.settings import RoutingSettings as Settings

__all__ = ["Settings", "draw", "run", "summary"]
