"""The open `using` blocks of a memory: changed settings, and the documents that may be read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from emt.config import SETTINGS, MemoryConfig, check_names
from emt.errors import ConfigError
from emt.turn import Scopes
from memory_backends import MemoryBackend

CHANGEABLE = tuple(name for name, setting in SETTINGS.items() if setting.changeable)
_CHOOSING = ("documents", "where")


def changes_scope(settings: Mapping[str, Any]) -> bool:
    """Tell whether a block's settings choose documents."""
    return any(name in settings for name in _CHOOSING)


class UsingBlocks:
    """The open `using` blocks of one memory, the outermost first."""

    def __init__(self) -> None:
        self._open: list[Mapping[str, Any]] = []
        # Scopes, and of which state of the memory.
        self._last: tuple[MemoryBackend, tuple[object, ...], Scopes] | None = None

    def check(self, settings: Mapping[str, Any], config: MemoryConfig) -> MemoryConfig:
        """Return a config as a block would change it.

        Raises:
            ConfigError: a setting that is unknown, fixed, or of a wrong value.
        """
        _lists_of(settings.get("documents"))
        check_names(settings, (*SETTINGS, *_CHOOSING))
        changes = _config_changes(settings)
        changed = config.replace(**changes)
        fixed = sorted(set(changes) - set(CHANGEABLE))
        if fixed:
            raise ConfigError(
                f"using() changes {', '.join((*CHANGEABLE, *_CHOOSING))}; {fixed[0]!r} is fixed "
                "by attach(). Detach, and attach with another config."
            )
        return changed

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any], backend: MemoryBackend) -> Iterator[None]:
        """Let a block's settings hold in a `with` block.

        Raises:
            DocumentError: a document is unknown, or `where` is not a filter.
        """
        choice = {name: settings[name] for name in _CHOOSING if name in settings}
        if choice:  # before anything has changed
            _scopes_of({**self._choice(), **choice}, backend, missing_ok=False)
        self._open.append(settings)
        self._last = None
        try:
            yield
        finally:  # whatever other blocks began or ended meanwhile
            index = next(i for i, block in enumerate(self._open) if block is settings)
            del self._open[index]
            self._last = None

    @property
    def documents(self) -> Any:
        """What the innermost block that chooses `documents` has chosen; None for all."""
        return self._choice().get("documents")

    def config_of(self, config: MemoryConfig) -> MemoryConfig:
        """Return a config as the open blocks change it."""
        for settings in self._open:
            config = config.replace(**_config_changes(settings))
        return config

    def scopes(self, backend: MemoryBackend) -> Scopes:
        """Return the rows that may be read: for all alike, or for each prompt; None for all rows.

        Documents are looked up again when the memory has changed. One that was removed meanwhile
        has no rows, nor has one in a shard that is missing.

        Raises:
            StoreError: the catalogue cannot be read.
        """
        missing = backend.missing_shards
        if not self._open and not missing:
            return None
        last, state = self._last, (backend.num_changes, missing)
        if last is None or last[0] is not backend or last[1] != state:
            scopes = _scopes_of(self._choice(), backend, missing_ok=True)
            if missing:
                scopes = _without_missing(scopes, backend)
            self._last = last = backend, state, scopes
        return last[2]

    def forget_scopes(self) -> None:
        """Look documents up again: their metadata may have changed, and no row has."""
        self._last = None

    def _choice(self) -> dict[str, Any]:
        """Return which documents the innermost blocks choose that choose some."""
        return {
            name: settings[name]
            for settings in self._open
            for name in _CHOOSING
            if name in settings
        }


def _config_changes(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _CHOOSING}


def _scopes_of(choice: Mapping[str, Any], backend: MemoryBackend, *, missing_ok: bool) -> Scopes:
    where, documents = choice.get("where"), choice.get("documents")
    if where is None and documents is None:
        return None
    lists, filters, catalog = _lists_of(documents), _filters_of(where), backend.catalog
    with catalog.snapshot():
        if lists is None and filters is None:
            return catalog.scope(documents, where, missing_ok=missing_ok)
        lists = [documents] * len(filters or ()) if lists is None else lists
        filters = [where] * len(lists) if filters is None else filters
        if len(lists) != len(filters):
            raise ConfigError(
                f"documents were given for {len(lists)} prompts, and where for {len(filters)}. "
                "Give both for each prompt of the batch, or one of them for all of it."
            )
        return tuple(
            catalog.scope(names, wanted, missing_ok=missing_ok)
            for names, wanted in zip(lists, filters, strict=True)
        )


def _without_missing(scopes: Scopes, backend: MemoryBackend) -> Scopes:
    """Leave out rows of missing shards, which the catalogue has."""
    if isinstance(scopes, tuple):
        return tuple(backend.readable(scope) for scope in scopes)
    return backend.readable(scopes)


def documents_without(documents: Any, hidden: Collection[str], every: Sequence[str]) -> Any:
    """Return `documents`, as `using` takes them, without some; None stands for `every` one."""
    if documents is None:
        documents = every
    if not _is_list(documents):  # which using() refuses
        return documents
    return [
        each if isinstance(each, str) else documents_without(each, hidden, every)
        for each in documents
        if not (isinstance(each, str) and each in hidden)
    ]


def _lists_of(documents: Any) -> list[Sequence[str] | None] | None:
    """Return documents by prompt; None if they are for all prompts alike.

    Raises:
        ConfigError: they are not names, or lists of names.
    """
    if documents is None:
        return None
    given: list[Any] = list(documents) if _is_list(documents) else [documents]
    if all(isinstance(name, str) for name in given) and _is_list(documents):
        return None
    if not all(
        names is None or (_is_list(names) and all(isinstance(name, str) for name in names))
        for names in given
    ):
        raise ConfigError(
            "documents must be a list of names, or a list of them for each prompt of a batch; "
            f"got {documents!r:.100}."
        )
    return given


def _filters_of(where: Any) -> list[Any] | None:
    """Return filters by prompt; None if one is for all prompts alike."""
    return list(where) if isinstance(where, list | tuple) and where else None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
