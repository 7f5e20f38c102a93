"""What a reader is shown: README.md, CONTRIBUTING.md and the pages under docs/."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("[gr]*/*.md")),
]
MEASURED = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.md"))
"""Pages that scripts write, and results; docs/benchmarks is a link to their folder."""


def text_of(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def python_of(page: str) -> list[str]:
    """Return the blocks of Python of a page, in order."""
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```$", text_of(page), flags=re.M | re.S)
    return [textwrap.dedent(block) for _, block in blocks]


def shell_of(page: str) -> list[str]:
    """Return the commands of a page: lines of blocks without a language, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```$", text_of(page), flags=re.M | re.S)
    lines = re.sub(r"\\?\n +", " ", "\n".join(blocks)).splitlines()
    return [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines]
