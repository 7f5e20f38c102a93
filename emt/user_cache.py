"""The user's cache directory: converted models and head profiles, which any process may use.

Everything in it can be made again, so removing it loses nothing.
"""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the directory, which may not exist yet.

    It is `EMT_CACHE` of the environment, else `emt` in `XDG_CACHE_HOME`, else `~/.cache/emt`.
    """
    own = os.environ.get("EMT_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "emt"
