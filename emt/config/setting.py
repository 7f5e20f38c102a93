"""One setting, declared once: the field of a dataclass, with its text and what it may be.

Everything else that lists settings is made of these declarations: the checks and their messages,
`help(MemoryConfig)`, the YAML files, what `Memory.using` changes, and the published names.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from emt.errors import ConfigError

T = TypeVar("T")

_WORDS = {
    bool: "true or false",
    int: "a whole number of at least 1",
    float: "a number",
    str: "a text",
}


def setting(default: T, doc: str, **declared: Any) -> T:
    """Declare a dataclass field as a setting; `declared` is what else `Setting` keeps of it."""
    return field(default=default, metadata={"doc": doc, **declared})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting as it was declared.

    A text must not be empty, and the whole numbers of a tuple must not be negative; a whole number
    must be at least 1. `accepts` says what must hold besides, and of a whole number instead.

    Attributes:
        name: the field's name.
        types: what its annotation allows; of a union, each member.
        default: its value if none is given.
        doc: what it does, in sentences.
        group: the YAML mapping that has it; None for the top level.
        changeable: whether `Memory.using` changes it.
        published: its names in checkpoints and calls of the published implementation.
        as_published: its value in the published method, where the default is another; else None.
        values: what it may be, in words; None to say so from `types`. null need not be named.
        accepts: tells whether a value of the right type, not None, is in range.
    """

    name: str
    types: tuple[Any, ...]
    default: Any
    doc: str
    group: str | None = None
    changeable: bool = False
    published: tuple[str, ...] = ()
    as_published: Any = None
    values: str | None = None
    accepts: Callable[[Any], bool] | None = None

    @property
    def expected(self) -> str:
        """What a value must be, in words: "a whole number of at least 1, or 'auto'"."""
        words = [self.values] if self.values else [w for kind in self.types for w in _words(kind)]
        if NoneType in self.types:
            words.append("null")
        if len(words) == 1:
            return words[0]
        last = ", or " if " " in words[0] else " or "
        return ", ".join(words[:-1]) + last + words[-1]

    @property
    def place(self) -> str:
        """Where it stands in YAML, as errors say."""
        return "at the top level" if self.group is None else f"in the group '{self.group}'"

    def checked(self, value: Any) -> Any:
        """Return a value in the setting's type, from what Python or YAML gives.

        A list becomes a tuple, a path text, a whole number a float and a mapping a dataclass, where
        the setting's type is that.

        Raises:
            ConfigError: a value of a wrong type or out of range.
        """
        value = self._converted(value)
        is_right = any(_is_of(value, kind) for kind in self.types)
        accepts = _is_positive if self.accepts is None and type(value) is int else self.accepts
        if is_right and value is not None and accepts is not None:
            is_right = accepts(value)
        if not is_right:
            raise ConfigError(f"{self.name} must be {self.expected}; got {value!r}.")
        return value

    def _converted(self, value: Any) -> Any:
        for kind in self.types:
            if kind is str and isinstance(value, Path):
                return str(value)
            if kind is float and type(value) is int:
                return float(value)
            if get_origin(kind) is tuple and isinstance(value, list):
                return tuple(value)
            if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
                return cast(Any, kind).from_mapping(value)
        return value


def settings_of(kind: type) -> dict[str, Setting]:
    """Return the settings of a dataclass by name, in the order in which they are declared."""
    types = get_type_hints(kind)
    return {
        each.name: Setting(
            name=each.name,
            types=_members(types[each.name]),
            default=each.default,
            **each.metadata,
        )
        for each in dataclasses.fields(kind)
    }


def documented(doc: str, settings: Mapping[str, Setting]) -> str:
    """Return a class's docstring with its settings, as `help` shows it."""
    lines = ["", "    Settings:"]
    for each in settings.values():
        about = [f"Must be {each.expected}; {each.default!r} if not given."]
        if each.changeable:
            about.append("Changed by `Memory.using`.")
        if each.published:
            about.append(f"Published as {' or '.join(each.published)}.")
        if each.as_published is not None:
            about.append(f"{each.as_published!r} in the published method.")
        indent = " " * 12
        lines.append(f"        {each.name}:")
        for text in (each.doc, " ".join(about)):
            lines += textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent)
    return doc.rstrip() + "\n" + "\n".join(lines) + "\n    "


def check_names(given: Iterable[object], names: Iterable[str], of: str = "memory") -> None:
    """Refuse a name that no setting of a memory, or of a model, has.

    Raises:
        ConfigError: naming the nearest of `names`, or all of them.
    """
    names = tuple(names)
    for name in given:
        if name not in names:
            near = did_you_mean(name, names)
            hint = f"Did you mean '{near}'?" if near else f"The settings are {', '.join(names)}."
            raise ConfigError(f"unknown {of} setting {name!r}. {hint}")


def did_you_mean(name: object, names: Iterable[str]) -> str | None:
    """Return the name that is nearest to a misspelt one, if one is near."""
    return next(iter(difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)), None)


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _words(kind: Any) -> list[str]:
    """Say what values a type has; nothing of None, which is named last."""
    if get_origin(kind) is Literal:
        return [repr(value) for value in get_args(kind)]
    return [_WORDS[kind]] if kind in _WORDS else []


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(i) is int and i >= 0 for i in value)
    if kind is int:
        return type(value) is int
    if kind is str:
        return isinstance(value, str) and bool(value)
    return isinstance(value, kind)


def _is_positive(value: int) -> bool:
    return value >= 1
