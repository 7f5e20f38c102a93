"""How often the right passage is found: see configs/experiments/routing.yaml.

    python scripts/run_routing.py --base configs/experiments/routing.yaml --set store=DIR \
        --set data=FILE

Run it again to go on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import run
from experiments.routing.experiment import run_routing
from experiments.routing.report import draw, summary
from experiments.routing.settings import RoutingSettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Route, then say what was found."""
    run(__doc__, RoutingSettings, run_routing, summary, draw, arguments)


if __name__ == "__main__":
    main()
