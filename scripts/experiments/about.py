"""Where numbers come from: machine, versions, code revision."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("emt", "torch", "transformers", "faiss-cpu", "faiss-gpu", "numpy", "bm25s")


def about() -> dict[str, Any]:
    """Describe the machine, the versions and the code, as plain JSON types."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions,
        "revision": revision(),
    }


def machine() -> str:
    """Name the processor, how many cores this process may use, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}"


def revision() -> str | None:
    """Return the git revision of the code, with "+" if files were changed; None outside of git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    describe = ["describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run([*git, *describe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
