"""The keys of a server: a file of them, and who a request comes from.

Only the SHA-256 of a key is kept in the process. No error, log record or answer has a key in it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from fastapi import Depends, Request

from emt.config.setting import did_you_mean
from emt.config.yaml_form import StrictLoader
from emt.errors import ConfigError, DocumentError
from emt.serving.access import Access
from emt.serving.errors import ServingError
from memory_backends.catalog.metadata import check_where

__all__ = ["Access", "Keys", "access_of", "unscoped_access_of", "writing_access_of"]

_MIN_LENGTH = 16
_FIELDS = ("key", "sha256", "name", "where", "write")


class Keys:
    """What each key may see and write.

    Args:
        accesses: by the SHA-256 of the key, 32 bytes.
    """

    def __init__(self, accesses: Mapping[bytes, Access]) -> None:
        self._accesses = dict(accesses)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a file of keys, in YAML or JSON.

        It has a list `keys`, each with `name`; `key`, of at least 16 printable ASCII characters, or
        `sha256`, the SHA-256 of it in hex; `where`, the metadata of documents that the key sees,
        all if it is left out; and `write`, whether it may write and remove, False if it is left
        out.

        Raises:
            ConfigError: the file cannot be read, or has something else; no key is in the message.
        """
        accesses: dict[bytes, Access] = {}
        names: set[str] = set()
        for number, entry in enumerate(_entries(path), start=1):
            try:
                digest, access = _of_entry(entry)
                if access.name in names:
                    raise ConfigError("the name is given twice. Give each key its own.")
                if digest in accesses:
                    raise ConfigError("it is the same as one before. Give each its own.")
            except ConfigError as error:
                raise ConfigError(f"key {number} of '{path}': {error}") from None
            names.add(access.name)
            accesses[digest] = access
        if not accesses:
            raise ConfigError(f"'{path}' has no keys. Give each user one, in a list `keys`.")
        return cls(accesses)

    def access(self, key: str) -> Access | None:
        """Return what a key may do, in a time that does not tell how much of it is right."""
        given = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for digest, access in self._accesses.items():  # all of them, whichever it is
            if hmac.compare_digest(given, digest):
                found = access
        return found

    def __repr__(self) -> str:
        return f"Keys({', '.join(access.name for access in self._accesses.values())})"


async def access_of(request: Request) -> Access:
    """Return what a request may see and write: a dependency of every route but /health and /ready.

    Raises:
        ServingError: 401, there are keys, and the request has none of them.
    """
    served = request.app.state.served
    keys: Keys | None = served.keys
    if keys is None:
        return Access(can_write=served.can_write)
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    access = keys.access(key.strip()) if scheme.lower() == "bearer" else None
    if access is None:
        raise ServingError(
            401,
            "This server needs a key of its own, as `Authorization: Bearer KEY`; the request has "
            + ("none." if not key else "another one."),
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return access if served.can_write else replace(access, can_write=False)


async def writing_access_of(access: Annotated[Access, Depends(access_of)]) -> Access:
    """Return what a request may write: a dependency of routes that change the store.

    Raises:
        ServingError: 401, as `access_of`; 403, the key may only read.
    """
    if not access.can_write:
        raise ServingError(403, "This key may not write or remove documents.", code="read_only")
    return access


async def unscoped_access_of(access: Annotated[Access, Depends(access_of)]) -> Access:
    """Return the access of a request that may see everything: a dependency of /metrics.

    Raises:
        ServingError: 401, as `access_of`; 403, the key sees only some documents.
    """
    if access.is_scoped:
        raise ServingError(403, "Only a key that sees all documents may ask for this.")
    return access


def _entries(path: Path | str) -> list[Any]:
    """Return the list of a file of keys; no message quotes the file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        is_json = Path(path).suffix == ".json"
        values = json.loads(text) if is_json else yaml.load(text, StrictLoader)
    except OSError as error:
        raise ConfigError(f"keys '{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = getattr(error, "lineno", None) if mark is None else mark.line + 1
        place = "" if line is None else f" (line {line})"
        raise ConfigError(f"keys '{path}' are neither YAML nor JSON{place}.") from None
    entries = values.get("keys") if isinstance(values, dict) else values
    if not isinstance(entries, list) or (isinstance(values, dict) and len(values) != 1):
        raise ConfigError(f"keys '{path}' must be a list under `keys`, and nothing beside it.")
    return entries


def _of_entry(entry: Any) -> tuple[bytes, Access]:
    """Return the SHA-256 of a key, and what it may do."""
    if not isinstance(entry, dict):
        raise ConfigError(f"expected a mapping with {', '.join(_FIELDS)}.")
    for name in entry:
        if name not in _FIELDS:  # it is not shown: it may be a key
            near = did_you_mean(name, _FIELDS)
            hint = f"Did you mean {near!r}?" if near else f"There are {', '.join(_FIELDS)}."
            raise ConfigError(f"it has an unknown field. {hint}")
    name, where, can_write = entry.get("name"), entry.get("where"), entry.get("write", False)
    if not isinstance(name, str) or not name.isprintable() or not name.strip():
        raise ConfigError("`name` must be text, to tell the key from others in logs.")
    if type(can_write) is not bool:
        raise ConfigError(f"`write` must be true or false; got a {type(can_write).__name__}.")
    return _digest(entry), Access(_checked(where) if "where" in entry else {}, can_write, name)


def _digest(entry: Mapping[str, Any]) -> bytes:
    if ("key" in entry) == ("sha256" in entry):
        raise ConfigError("give one of `key` and `sha256`.")
    value = entry.get("key", entry.get("sha256"))
    if not isinstance(value, str):
        raise ConfigError(f"a key must be text; got a {type(value).__name__}. Put it in quotes.")
    if "sha256" in entry:
        if len(value) != 64 or not set(value.lower()) <= set("0123456789abcdef"):
            raise ConfigError("`sha256` must be 64 hex digits.")
        return bytes.fromhex(value)
    if len(value) < _MIN_LENGTH or not all("!" <= letter <= "~" for letter in value):
        raise ConfigError(
            f"`key` must be at least {_MIN_LENGTH} printable ASCII characters, without spaces; "
            f"got {len(value)} characters."
        )
    return hashlib.sha256(value.encode()).digest()


def _checked(where: Any) -> dict[str, Any]:
    """Return a scope that leaves something in, and something out."""
    try:
        checked = check_where(where)
    except DocumentError as error:
        raise ConfigError(str(error)) from None
    if not checked or not all(checked.values()) or not all(checked):
        raise ConfigError(
            "`where` must have a key, with at least one value each. Leave `where` out for a key "
            "that sees everything."
        )
    return dict(checked)
