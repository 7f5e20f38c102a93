"""Two conditions of a run, item by item: python scripts/compare.py RESULTS NAME OTHER

Mean differences NAME - OTHER over the same items, with 95 % bootstrap intervals, for each split of
retrieval, or each size and set of a comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.command import one_line_errors
from experiments.registry import experiment_of
from experiments.results import read_results
from experiments.tables import COUNT, Record, average, grouped, records_table

from emt.errors import ConfigError


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("name", help="a condition")
    parser.add_argument("other", help="the condition that is subtracted")
    options = parser.parse_args()
    with one_line_errors():
        header, items = read_results(options.results)
        report = experiment_of(header["experiment"]).report
        *places, _ = same = getattr(report, "SAME", ("id",))
        by_condition = grouped(items.values(), "condition") if places else {}
        records, others = (by_condition.get((n,), []) for n in (options.name, options.other))
        keys = {tuple(record[key] for key in same): record.get("text") for record in others}
        records = [one for one in records if tuple(one[key] for key in same) in keys]
        if not records:
            raise ConfigError(
                f"expected answers of {options.name} and {options.other} to the same items; "
                f"'{options.results}' has none."
            )
        same_text = average("same text, %", lambda one: _says_the_same(one, keys, same), ".0f", 100)
        columns = [COUNT, *report.differences(others), same_text]
        print(records_table(grouped(records, *places), places, columns))


def _says_the_same(
    record: Record, texts: Mapping[tuple[Any, ...], str | None], same: Sequence[str]
) -> bool | None:
    """Tell whether both conditions gave one text; None without texts."""
    text = record.get("text")
    return None if text is None else text == texts[tuple(record[key] for key in same)]


if __name__ == "__main__":
    main()
