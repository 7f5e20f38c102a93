"""What `Memory.using` changes for a while: settings, and the documents that are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emt.config import SETTINGS, MemoryConfig, check_names
from emt.errors import ConfigError
from memory_backends import MemoryBackend, Scope

CHANGEABLE = tuple(name for name, each in SETTINGS.items() if each.changeable)
_CHOOSING = ("documents", "where")

Scopes = Scope | tuple[Scope, ...] | None


def changes_scope(settings: Mapping[str, Any]) -> bool:
    """Tell whether a block's settings choose documents."""
    return any(name in settings for name in _CHOOSING)


class UsingBlocks:
    """The open `using` blocks of one memory, the outermost first."""

    def __init__(self) -> None:
        self._open: list[Mapping[str, Any]] = []
        self._found: tuple[MemoryBackend, int, Scopes] | None = None

    def check(self, settings: Mapping[str, Any], config: MemoryConfig) -> MemoryConfig:
        """Return a config as a block would change it.

        Raises:
            ConfigError: a setting that is unknown, fixed, or of a wrong value.
        """
        documents = settings.get("documents")
        _lists_of(documents)
        check_names(settings, (*SETTINGS, *_CHOOSING))
        changes = {name: value for name, value in settings.items() if name not in _CHOOSING}
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
        names = {name: settings[name] for name in _CHOOSING if name in settings}
        if names:  # before anything has changed
            _scopes_of({**self._chosen(), **names}, backend, known=True)
        self._open.append(settings)
        self._found = None
        try:
            yield
        finally:  # whatever other blocks began or ended meanwhile
            at = next(i for i, mine in enumerate(self._open) if mine is settings)
            del self._open[at]
            self._found = None

    def config_of(self, config: MemoryConfig) -> MemoryConfig:
        """Return a config as the open blocks change it."""
        for settings in self._open:
            changes = {name: value for name, value in settings.items() if name not in _CHOOSING}
            config = config.replace(**changes)
        return config

    def scopes(self, backend: MemoryBackend) -> Scopes:
        """Return the rows that may be found: for all alike, or for each prompt; None for all rows.

        Documents are looked up again when the memory has changed. One that was removed meanwhile
        has no rows.

        Raises:
            StoreError: the catalogue cannot be read.
        """
        if not self._open:
            return None
        found = self._found
        if found is None or found[0] is not backend or found[1] != backend.num_changes:
            changes = backend.num_changes
            found = (backend, changes, _scopes_of(self._chosen(), backend, known=False))
            self._found = found
        return found[2]

    def forget(self) -> None:
        """Look documents up again: their metadata may have changed, and no row has."""
        self._found = None

    def _chosen(self) -> dict[str, Any]:
        """Return what the innermost blocks say that say something."""
        return {
            name: settings[name]
            for settings in self._open
            for name in _CHOOSING
            if name in settings
        }


def _scopes_of(chosen: Mapping[str, Any], backend: MemoryBackend, *, known: bool) -> Scopes:
    where, documents = chosen.get("where"), chosen.get("documents")
    if where is None and documents is None:
        return None
    lists, catalog = _lists_of(documents), backend.catalog
    with catalog.snapshot():
        if lists is None:
            return catalog.scope(documents, where, missing_ok=not known)
        return tuple(catalog.scope(names, where, missing_ok=not known) for names in lists)


def _lists_of(documents: Any) -> list[Sequence[str]] | None:
    """Return documents by prompt; None if they are for all prompts alike.

    Raises:
        ConfigError: they are not names, or lists of names.
    """
    if documents is None:
        return None
    given: list[Any] = list(documents) if _is_list(documents) else [None]
    if all(isinstance(name, str) for name in given):
        return None
    if not all(_is_list(names) and all(isinstance(name, str) for name in names) for names in given):
        raise ConfigError(
            "documents must be a list of names, or a list of them for each prompt of a batch; "
            f"got {documents!r:.100}."
        )
    return given


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
