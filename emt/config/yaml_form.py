"""Settings as YAML: in groups, each explained, read with clear errors."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from emt.config.setting import Setting, did_you_mean
from emt.errors import ConfigError

GROUPS = {
    "reading": "How documents are read into memory.",
    "token": "Token mode: each query retrieves single memories.",
    "passage": "Passage mode: whole passages are found and recalled.",
    "search": "How rows are searched.",
    "store": "How and where rows are kept.",
}
_WIDTH = 100


class StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a mapping may not have a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping, if no key comes twice."""
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


def load(path: Path | str) -> dict[Any, Any]:
    """Read a YAML mapping; an empty file is an empty one.

    Raises:
        ConfigError: the file is missing, no YAML or no mapping, or has a key twice.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config '{path}' cannot be read as YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"config '{path}' must be a mapping of settings; got a {type(values).__name__}."
        )
    return values


def flat(values: Mapping[Any, Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Take settings out of their groups; some or all may be at the top level already.

    Raises:
        ConfigError: an unknown key, one in a wrong group, or a setting given twice.
    """
    flattened: dict[str, Any] = {}
    for group, name, value in _entries(values, settings):
        if name not in settings:
            raise ConfigError(_unknown(name, group, settings))
        if group not in (None, settings[name].group):
            raise ConfigError(f"'{name}' belongs {settings[name].place}, not in '{group}'.")
        if name in flattened:
            raise ConfigError(
                f"'{name}' is given twice: at the top level and {settings[name].place}. Keep one."
            )
        flattened[name] = value
    return flattened


def dump(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> str:
    """Return YAML of settings, each with its text above it and what it may be beside it.

    Values are plain YAML types; the settings of a group must follow one another.
    """
    lines: list[str] = []
    last = None
    for name, each in settings.items():
        if each.group is not None and each.group != last:
            lines += ["", "", f"# {GROUPS[each.group]}", f"{each.group}:"]
        elif lines:
            lines.append("")
        indent = "" if each.group is None else "  "
        comment = f"{indent}# "
        lines += textwrap.wrap(each.doc, _WIDTH, initial_indent=comment, subsequent_indent=comment)
        entry = yaml.safe_dump({name: values[name]}, default_flow_style=True, width=float("inf"))
        lines.append(f"{indent}{entry.strip()[1:-1]}  # {each.expected}")
        last = each.group
    return "\n".join(lines) + "\n"


def _entries(
    values: Mapping[Any, Any], settings: Mapping[str, Setting]
) -> Iterator[tuple[str | None, Any, Any]]:
    """Yield group, key and value of each entry; the group None for the top level."""
    for key, value in values.items():
        if key not in GROUPS:
            yield None, key, value
            continue
        if value is not None and not isinstance(value, Mapping):
            names = [name for name, each in settings.items() if each.group == key]
            raise ConfigError(
                f"'{key}' is a group of settings ({', '.join(names)}) and must be a mapping; got "
                f"{value!r:.100}."
            )
        for name, of_group in (value or {}).items():
            yield key, name, of_group


def _unknown(name: Any, group: str | None, settings: Mapping[str, Setting]) -> str:
    """Return the error for a key that is neither a setting nor a group."""
    place = "a memory config" if group is None else f"the group '{group}'"
    near = did_you_mean(name, (*settings, *GROUPS))
    if near is None:
        hint = f"The settings are {', '.join(settings)}."
    elif near in GROUPS:
        hint = f"Did you mean the group '{near}'?"
    else:
        hint = f"Did you mean '{near}' ({settings[near].place})?"
    return f"unknown key {name!r} in {place}. {hint}"
