"""What the values of an experiment's settings must be."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from emt.config import MemoryConfig
from emt.errors import ConfigError


def check(settings: object, name: str, accepts: Callable[[Any], bool], what: str) -> None:
    """Refuse a value.

    Raises:
        ConfigError: saying what it must be.
    """
    value = getattr(settings, name)
    if not accepts(value):
        raise ConfigError(f"{name} must be {what}; got {value!r}.")


def check_memory(values: Any, name: str, *, fixed: Collection[str] = ()) -> None:
    """Refuse what are no settings of a memory.

    Args:
        values: keys and values of `MemoryConfig`.
        name: what the settings call them.
        fixed: keys that the experiment sets itself.

    Raises:
        ConfigError: naming the key.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a mapping of memory settings; got {values!r}.")
    for key in fixed:
        if key in values:
            raise ConfigError(f"{name}.{key} cannot be set: the experiment sets it. Leave it out.")
    try:
        MemoryConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def is_text(value: Any) -> bool:
    """Tell whether a value is text, not empty."""
    return isinstance(value, str) and bool(value)


def is_positive(value: Any) -> bool:
    """Tell whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_seed(value: Any) -> bool:
    """Tell whether a value is a whole number of at least 0, as seeds are."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_none_or_positive(value: Any) -> bool:
    """Tell whether a value is null, or a whole number of at least 1."""
    return value is None or is_positive(value)


def is_ascending(value: Any) -> bool:
    """Tell whether a value is a list of whole numbers of at least 1, each above the one before."""
    is_list = isinstance(value, list) and bool(value) and all(map(is_positive, value))
    return is_list and value == sorted(set(value))
