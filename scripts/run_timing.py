"""Seconds a query over the number of queries on one document: see configs/experiments/timing.yaml.

    python scripts/run_timing.py --base configs/experiments/timing.yaml [--preset smoke]

Run it again to go on where it was stopped.
"""

from curve_command import run

from emt.experiments.timing import run_timing
from emt.experiments.timing_report import plot, summary
from emt.experiments.timing_settings import TimingSettings

if __name__ == "__main__":
    run("timing", TimingSettings, run_timing, summary, plot)
