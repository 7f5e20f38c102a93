"""Make the tables and plots of results again, from `results.jsonl` alone.

python scripts/plot.py results/retrieval-smoke/results.jsonl [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.command import one_line_errors, write_report
from experiments.results import read_results


def main() -> None:
    """Write summary and plots beside the results, or to another folder."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path, help="a results.jsonl")
    parser.add_argument("--output", type=Path, help="a folder (default: that of the results)")
    options = parser.parse_args()
    with one_line_errors():
        header, items = read_results(options.results)
        print(*write_report(header, items, options.output or options.results.parent), sep="\n")


if __name__ == "__main__":
    main()
