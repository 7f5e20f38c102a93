"""The user's cache directory: converted models and head profiles, which any process may use.

Everything in it can be made again, so removing it loses nothing.
"""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the directory, which may not exist yet.

    It is `EMT_CACHE` of the environment, else `emt` in `XDG_CACHE_HOME`, else `~/.cache/emt`.

    Raises:
        OSError: the user has no home directory, as in a container.
    """
    own, shared = os.environ.get("EMT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache") / "emt"
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"the home directory in '{folder}' is not known") from error
