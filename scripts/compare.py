"""Two conditions of a retrieval run, item by item: python scripts/compare.py RESULTS NAME OTHER

Mean differences NAME - OTHER over the same items, with 95 % bootstrap intervals, by split or size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.command import one_line_errors
from experiments.results import read_results
from experiments.retrieval.report import differences
from experiments.tables import COUNT, average, grouped, records_table

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
        texts = {(record["split"], record["id"]): record["text"] for record in others}
        records = [record for record in records if (record["split"], record["id"]) in texts]
        if not records:
            raise ConfigError(
                f"expected answers of {options.name} and {options.other} to the same items; "
                f"'{options.results}' has none."
            )
        same_text = average(
            "same text, %", lambda r: r["text"] == texts[r["split"], r["id"]], ".0f", 100
        )
        columns = [COUNT, *differences(others), same_text]
        print(records_table(grouped(records, "split"), ["split"], columns))


if __name__ == "__main__":
    main()
