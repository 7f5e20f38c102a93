"""Make counterfactual items from articles with questions and answers.

    python scripts/build_items.py --base configs/experiments/build_items.yaml \\
        --set articles=squad.json --set output=items.jsonl
"""

from __future__ import annotations

import argparse
import sys

from experiments.builder.builder import BuildSettings, build, write_items
from experiments.settings import load_settings

from emt.cli.session import quiet
from emt.errors import EMTError


def main() -> None:
    """Build, write, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="settings, YAML")
    parser.add_argument("--preset", help="a set of changes that the settings name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    options = parser.parse_args()
    try:
        settings = load_settings(
            BuildSettings, options.base, preset=options.preset, changes=options.changes
        )
        with quiet():
            built = build(settings)
        write_items(built, settings.output)
    except EMTError as error:
        print(f"build_items: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    report = built.report
    print(f"{report['questions']:,} questions of {report['articles']} articles")
    for title in ("items", "kinds", "rejected"):
        print(f"\n| {title} | |\n|---|---:|")
        for name, number in report[title].items():
            print(f"| {name} | {number:,} |")
    print(f"\n{len(built.items):,} items in '{settings.output}'")


if __name__ == "__main__":
    main()
