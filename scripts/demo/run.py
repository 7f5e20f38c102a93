"""The demo: index ten documents in one process, ask about them in another.

    python scripts/demo/run.py

What it runs are two ordinary commands, printed before they start. The store stays in `.demo/store`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STORE = ROOT / ".demo" / "store"


def run(*arguments: str) -> None:
    """Print and run a Python command in a new process."""
    shown = [
        Path(a).relative_to(ROOT).as_posix() if a.startswith(str(ROOT)) else a for a in arguments
    ]
    print(f"\n$ python {' '.join(shown)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    """Index, then ask in a new process."""
    shutil.rmtree(STORE, ignore_errors=True)
    run("-m", "emt", "index", str(HERE / "documents"), "--store", str(STORE))
    run(str(HERE / "ask.py"), str(STORE))


if __name__ == "__main__":
    main()
