"""Two conditions of a retrieval run, item by item: python scripts/compare.py RESULTS NAME OTHER

Mean differences NAME - OTHER over the same items, with 95 % bootstrap intervals, by split or size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.command import one_line_errors
from experiments.results import read_results
from experiments.retrieval.report import differences
from experiments.tables import COUNT, grouped, records_table

from emt.errors import ConfigError


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("name", help="a condition")
    parser.add_argument("other", help="the condition that is subtracted")
    options = parser.parse_args()
    with one_line_errors():
        _, items = read_results(options.results)
        by_condition = grouped(items.values(), "condition")
        records, others = (by_condition.get((n,), []) for n in (options.name, options.other))
        both = {(record["split"], record["id"]) for record in others}
        records = [record for record in records if (record["split"], record["id"]) in both]
        if not records:
            raise ConfigError(
                f"expected answers of {options.name} and {options.other} to the same items; "
                f"'{options.results}' has none."
            )
        print(records_table(grouped(records, "split"), ["split"], [COUNT, *differences(others)]))


if __name__ == "__main__":
    main()
