"""A .gguf file, converted once: its model and tokenizer as a folder in the user's cache directory.

transformers takes a minute to parse what a folder of safetensors gives in a second. A folder is
named by the file's content and the version of transformers that parsed it. It appears under its
name when it is whole, and checksums tell whether it still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import GgufConfig

from emt.errors import ConfigError
from emt.model.pretrained import from_pretrained
from emt.user_cache import user_cache

_CHECKSUMS = "checksums.json"
_PARTIAL = ".partial-"
_CHUNK = 1 << 20  # bytes
_DAY = 86400.0  # seconds, after which an unfinished folder is nobody's


def parsed(file: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the place, the options and the keywords with which `from_pretrained` parses a file.

    Weights are unpacked; left in blocks they could not be saved, moved to a dtype or trained.
    """
    how = {"quantization_config": GgufConfig(dequantize=True)}
    return str(file.parent), {"gguf_file": file.name}, how


def converted(file: Path, source: str, on_message: Callable[[str], object]) -> Path | None:
    """Return the folder that a .gguf file was converted to; convert it if that was not done yet.

    Args:
        file: the .gguf file.
        source: its name for the user, in errors.
        on_message: called with what is done, and with the reason if nothing could be kept.

    Returns:
        None if the folder cannot be written, so that the file itself must be parsed.

    Raises:
        ConfigError: the file cannot be read, or transformers cannot load it.
    """
    content = _hash(file, source)
    try:
        models = user_cache() / "models"
    except OSError as error:
        on_message(_not_kept("the user's cache", error))
        return None
    name = re.sub(r"[^\w.-]", "_", file.stem)[:40]
    made_of_it = f"{content}-transformers-{transformers.__version__}"
    folder = models / f"{name}-{made_of_it}"
    # A copy of the file may have another name.
    for made in (folder, *_below(models, f"*-{made_of_it}")):
        if _is_whole(made):
            return made
    partial = models / f"{_PARTIAL}{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        on_message(
            f"'{file.name}' is converted once, which takes a while. Its unpacked weights, several "
            f"times its {file.stat().st_size / 1e6:,.0f} MB, are kept in '{folder}'."
        )
        model, tokenizer = from_pretrained(source, *parsed(file))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _seal(partial)
        _put(partial, folder)
        _remove_leftovers(models, content, folder)
    except (OSError, SafetensorError) as error:
        on_message(_not_kept(f"'{models}'", error))
        return None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _not_kept(place: str, error: Exception) -> str:
    return (
        f"the converted model cannot be kept in {place}: {error}. Until EMT_CACHE names a "
        "directory that has room and can be written, each command takes as long."
    )


def _below(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _hash(file: Path, source: str) -> str:
    """Return the beginning of a file's SHA-256."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"model '{source}' cannot be read: {error.strerror}.") from error


def _seal(folder: Path) -> None:
    """Write the checksums of a folder's files, and make all as readable as the umask says."""
    files = sorted(folder.iterdir())
    (folder / _CHECKSUMS).write_text(json.dumps({file.name: _checksum(file) for file in files}))
    mode = (folder / _CHECKSUMS).stat().st_mode
    for file in files:  # safetensors writes for the owner only
        file.chmod(mode)


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder is there, and as it was sealed."""
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text())
        return bool(checksums) and all(
            _checksum(folder / name) == checksum for name, checksum in checksums.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(file: Path) -> int:
    """Return the CRC-32 of a file, which takes a fraction of the time of loading it."""
    checksum = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _put(partial: Path, folder: Path) -> None:
    """Give a sealed folder its name, in place of a damaged one."""
    try:
        partial.rename(folder)
    except OSError:
        if _is_whole(folder):  # another process was first
            return
        damaged = folder.rename(folder.with_name(f"{_PARTIAL}{uuid.uuid4().hex}"))
        partial.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _remove_leftovers(models: Path, content: str, folder: Path) -> None:
    """Remove what other versions of transformers made of the file, and unfinished folders."""
    for other in models.glob(f"*-{content}-transformers-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    for unfinished in models.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if unfinished.stat().st_mtime < time.time() - _DAY:
                shutil.rmtree(unfinished, ignore_errors=True)
