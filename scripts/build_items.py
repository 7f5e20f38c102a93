"""Make counterfactual items from articles with questions and answers.

    python scripts/build_items.py --base configs/experiments/build_items.yaml \\
        --set articles=squad.json --set output=items.jsonl
"""

from __future__ import annotations

import argparse

from experiments.builder.articles import read_articles
from experiments.builder.build import build_items, token_counter, write_items
from experiments.builder.settings import BuildSettings
from experiments.command import one_line_errors
from experiments.settings import read_settings
from experiments.tables import table

from emt.cli import quiet


def main() -> None:
    """Build, write, and print the report."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--base", required=True, help="settings, YAML")
    parser.add_argument("--preset", help="a set of changes that the settings name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    options = parser.parse_args()
    with one_line_errors():
        values = read_settings(options.base, preset=options.preset, changes=options.changes)
        settings = BuildSettings(**values)
        articles = read_articles(settings.articles)
        with quiet():
            built = build_items(articles, settings, token_counter(settings.model))
        write_items(built, settings.output)
    report = built.report
    print(f"{report['questions']:,} questions of {report['articles']} articles")
    for title in ("items", "kinds", "rejected"):
        print("\n" + table([title, ""], [[name, f"{n:,}"] for name, n in report[title].items()]))
    print(f"\n{len(built.items):,} items in '{settings.output}'")


if __name__ == "__main__":
    main()
