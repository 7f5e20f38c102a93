"""Head profiles in the user's cache directory: made once for a model, used by all its memories.

The cache may be missing, full, damaged or shared by many processes: what fails is said once, and
everything goes on without it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import uuid
import zlib
from pathlib import Path

from emt.errors import ConfigError
from emt.routing.head_profile import HeadProfile
from emt.user_cache import user_cache

_logger = logging.getLogger(__name__)


def cached_profiles() -> list[HeadProfile]:
    """Return the profiles in the user's cache, the newest first, without damaged ones."""
    files = []
    with contextlib.suppress(OSError):  # no such directory for this user
        for path in _folder().glob("*.json"):
            with contextlib.suppress(OSError):  # it went just now, or is a link to nothing
                state = path.stat()
                files.append((state.st_mtime_ns, state.st_ino, path))
    profiles = [_read(path, mtime, inode) for mtime, inode, path in sorted(files, reverse=True)]
    return [profile for profile in profiles if profile is not None]


def cache_profile(profile: HeadProfile) -> Path | None:
    """Keep a profile in the user's cache, in one file for each model.

    Returns:
        The file; None if the cache cannot be written, which a log record says.
    """
    temporary = None
    try:
        path = _folder() / _file_name(profile)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        profile.write(temporary)
        temporary.replace(path)
    except (OSError, ConfigError) as error:
        _logger.warning(
            "the head profile of %s is not kept for other memories: %s", profile.model, error
        )
        return None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def _folder() -> Path:
    return user_cache() / "profiles"


def _file_name(profile: HeadProfile) -> str:
    """Name the model so that people know it, and its weights so that no other has the name."""
    readable = re.sub(r"[^\w.-]+", "-", profile.model, flags=re.ASCII).strip("-.")[:60]
    values = b"" if profile.sketch is None else profile.sketch.values.numpy().tobytes()
    return f"{readable or 'model'}-{zlib.crc32(values):08x}.json"


@functools.lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int, inode: int) -> HeadProfile | None:
    """Read a file once; a damaged one is None, which is said once."""
    try:
        return HeadProfile.read(path)
    except ConfigError as error:
        _logger.warning("a head profile in the user's cache is not used: %s", error)
        return None
