"""Two conditions of a retrieval run, item by item: python scripts/compare.py RESULTS ONE OTHER

Mean differences ONE - OTHER over the same items, with 95 % bootstrap intervals, by split or size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiment import one_line_errors
from experiments.results import read_results
from experiments.statistics import paired_difference

from emt.errors import ConfigError

_METRICS = {"right": "right", "preferred": "preferred", "log_prob": "log-probability, nats a token"}


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("one")
    parser.add_argument("other")
    options = parser.parse_args()
    with one_line_errors():
        _, items = read_results(options.results)
        print(f"| | n | {' | '.join(_METRICS.values())} |\n|---|---|---|---|---|")
        splits = dict.fromkeys(record["split"] for record in items.values())
        for split in splits:
            answers = {
                name: {r["id"]: r for r in items.values() if _is_of(r, split, name)}
                for name in (options.one, options.other)
            }
            one, other = answers[options.one], answers[options.other]
            both = [item for item in one if item in other]
            if not both:
                raise ConfigError(
                    f"expected answers of {options.one} and {options.other} to the same items at "
                    f"{split}; '{options.results}' has none."
                )
            cells = []
            for metric in _METRICS:
                pairs = [(float(one[item][metric]), float(other[item][metric])) for item in both]
                found = paired_difference(*map(list, zip(*pairs, strict=True)))
                cells.append(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
            print(f"| {split} | {len(both)} | {' | '.join(cells)} |")


def _is_of(record: dict[str, object], split: str, name: str) -> bool:
    return record["split"] == split and record["condition"] == name


if __name__ == "__main__":
    main()
