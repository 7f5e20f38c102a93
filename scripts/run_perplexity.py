"""Perplexity over length, with older text as memories: see configs/experiments/perplexity.yaml.

    python scripts/run_perplexity.py --base configs/experiments/perplexity.yaml [--preset smoke]

Run it again to go on where it was stopped.
"""

from curve_command import run

from emt.experiments.perplexity import run_perplexity
from emt.experiments.perplexity_report import plot, summary
from emt.experiments.perplexity_settings import PerplexitySettings

if __name__ == "__main__":
    run("perplexity", PerplexitySettings, run_perplexity, summary, plot)
