"""What an experiment is asked to do: a dataclass, from YAML, a preset and the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from emt.errors import ConfigError

T = TypeVar("T")


def load_settings(
    kind: type[T], base: Path | str, *, preset: str | None = None, changes: Iterable[str] = ()
) -> T:
    """Read an experiment's settings.

    Args:
        kind: a dataclass; its `__post_init__` checks values.
        base: a YAML file with keys of `kind`, and under `presets` named sets of changes.
        preset: which of them to apply.
        changes: `key=value`, value in YAML; `key.inner=value` for a key that is a mapping.

    Raises:
        ConfigError: the file cannot be read, or a key, preset or value is wrong.
    """
    try:
        values = yaml.safe_load(Path(base).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"settings '{base}' cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"settings '{base}' must be a mapping; got a {type(values).__name__}.")
    presets = values.pop("presets", None) or {}
    if not isinstance(presets, dict):
        raise ConfigError(f"the presets of settings '{base}' must be a mapping; got {presets!r}.")
    if preset is not None:
        if preset not in presets:
            raise ConfigError(
                f"settings '{base}' have no preset '{preset}'. "
                f"They have {', '.join(map(str, presets)) or 'none'}."
            )
        if not isinstance(presets[preset], dict):
            raise ConfigError(
                f"preset '{preset}' of settings '{base}' must be a mapping; "
                f"got {presets[preset]!r}."
            )
        values = {**values, **presets[preset]}
    for change in changes:
        _change(values, change)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else f" The keys are {', '.join(names)}."
            raise ConfigError(f"unknown key {key!r} in settings '{base}'.{hint}")
    try:
        return kind(**values)
    except TypeError as error:  # a key without a default is missing
        raise ConfigError(f"settings '{base}': {error}") from error


def _change(values: dict[str, Any], change: str) -> None:
    """Apply one `key=value` in place."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"a change must be key=value; got {change!r}.")
    *outer, last = key.split(".")
    for name in outer:
        inner = values.get(name)
        if inner is not None and not isinstance(inner, Mapping):
            raise ConfigError(f"'{name}' in {change!r} is not a mapping. Set it as a whole.")
        values[name] = dict(inner or {})
        values = values[name]
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {change!r} is not YAML: {error}") from error
