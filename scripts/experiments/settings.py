"""An experiment's settings: typed fields, read from YAML, a preset and the command line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from emt.config import PUBLISHED_METHOD, MemoryConfig
from emt.errors import ConfigError

FIXED_MEMORY_SETTINGS = ("path", "enabled")  # the experiments set these themselves


class Settings(BaseModel):
    """Base class of settings: unknown names and values of another type are errors.

    Raises:
        ConfigError: naming each wrong setting.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            names = list(type(self).model_fields)
            faults = [_described(fault, names) for fault in error.errors()]
            raise ConfigError("; ".join(faults)) from None


def read_settings(
    path: Path | str, *, preset: str | None = None, changes: Iterable[str] = ()
) -> dict[str, Any]:
    """Read settings from a YAML file.

    Args:
        path: a mapping in YAML; under `presets` it has named sets of changes.
        preset: the one to apply.
        changes: `key=value` with the value in YAML, or `key.inner=value` for a mapping.

    Raises:
        ConfigError: the file, the preset or a change cannot be used.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"settings '{path}' cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"settings '{path}' must be a mapping; got a {type(values).__name__}.")
    presets = values.pop("presets", None) or {}
    if preset is not None:
        if preset not in presets:
            names = ", ".join(map(str, presets)) or "none"
            raise ConfigError(f"settings '{path}' have no preset '{preset}'. They have {names}.")
        values |= presets[preset]
    for change in changes:
        _change(values, change)
    return values


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


def _described(fault: Any, names: list[str]) -> str:
    """Return what is wrong with one setting, from pydantic's description of it."""
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place, names, n=1, cutoff=0.5)
        hint = f"Did you mean '{close[0]}'?" if close else f"The settings are {', '.join(names)}."
        return f"unknown setting '{place}'. {hint}"
    if fault["type"] == "value_error":
        return ": ".join(filter(None, (place, str(fault["ctx"]["error"]))))
    return f"{place}: {fault['msg']}; got {fault['input']!r:.60}"


def _ascending(values: list[int]) -> list[int]:
    if values != sorted(set(values)):
        raise ConfigError(f"expected ascending numbers; got {values}.")
    return values


def memory_config(values: Mapping[str, Any]) -> MemoryConfig:
    """Return the settings of a memory; those of the published method where `values` name none.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    return MemoryConfig.from_dict(values, defaults=PUBLISHED_METHOD)


def _memory_settings(values: dict[str, Any]) -> dict[str, Any]:
    for name in FIXED_MEMORY_SETTINGS:
        if name in values:
            raise ConfigError(f"'{name}' cannot be set: the experiment sets it. Leave it out.")
    memory_config(values)
    return values


def named_conditions(standard: Mapping[str, dict[str, Any]]) -> Callable[[Any], Any]:
    """Return what makes conditions a mapping: names of standard ones alone, or with settings."""

    def mapped(conditions: Any) -> Any:
        if isinstance(conditions, list) and all(isinstance(name, str) for name in conditions):
            conditions = dict.fromkeys(conditions)
        if not isinstance(conditions, dict):
            raise ConfigError(f"expected some of {', '.join(standard)}; got {conditions!r}.")
        for name, values in conditions.items():
            if values is None and name not in standard:
                raise ConfigError(
                    f"unknown condition '{name}'. The conditions are {', '.join(standard)}; "
                    "another one needs settings."
                )
        return {
            name: {**standard.get(name, {}), **(values or {})}
            if isinstance(values, dict | None)
            else values
            for name, values in conditions.items()
        }

    return mapped


def _asks(template: str) -> str:
    if "{question}" not in template:
        raise ConfigError(f"expected a template with {{question}} in it; got {template!r}.")
    return template


Text = Annotated[str, Field(min_length=1)]
Ascending = Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(_ascending)]
MemorySettings = Annotated[dict[str, Any], AfterValidator(_memory_settings)]
QuestionTemplate = Annotated[str, AfterValidator(_asks)]
