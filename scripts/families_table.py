"""Write the README's table of model families: run the prefix oracle on each tiny model of the
tests.

    python scripts/families_table.py            # print the table
    python scripts/families_table.py --write    # put it into README.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import emt  # noqa: E402 - the tests are found from the repository's root
from emt.errors import UnsupportedModelError  # noqa: E402
from tests.families import FAMILIES, REFUSED, oracle_error  # noqa: E402

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| family | what is special | prefix oracle, largest logit difference |",
        "|---|---|---|",
    ]
    for family in FAMILIES:
        model = family.build()
        layers = list(range(model.config.num_hidden_layers))
        errors = []
        for kind in ("manual", "vector_db"):
            config = emt.MemoryConfig(memory_type=kind, index="Flat", layers=layers)
            memory = emt.attach(model, config)
            errors.append(oracle_error(model, memory, lengths=(12, 7, 3)))
            emt.detach(model)
        lines.append(f"| {family.model_type} | {family.note} | {max(errors):.1e} |")
    for family in REFUSED:
        try:
            emt.attach(family.build())
        except UnsupportedModelError as error:
            lines.append(f"| {family.model_type} | {family.note} | refused: {error} |")
    lines.append("")
    made_by = "`python scripts/families_table.py --write`"
    lines.append(f"Made by {made_by} with transformers {transformers.__version__}.")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    made = table()
    if not parser.parse_args().write:
        print(made)
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
