"""Pictures that no window shows."""

from __future__ import annotations

import importlib
from typing import Any

from emt.errors import ConfigError


def figure(**options: Any) -> Any:
    """Return a figure, made as `matplotlib.figure.Figure` is.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib. Install it with `pip install 'emt[experiments]'`; "
            "scripts/plot.py then draws results that are there."
        ) from error
    return module.Figure(**options)
