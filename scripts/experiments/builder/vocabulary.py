"""The lists of words and names in `words.yaml`."""

from __future__ import annotations

from pathlib import Path

import yaml

_LISTS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))

WORDS = {name: frozenset(words.split()) for name, words in _LISTS["words"].items()}
NUMBERS = {name: words.split() for name, words in _LISTS["numbers"].items()}
MONTHS = _LISTS["months"].split()
TYPE_OF_NAME = {name: type for type, names in _LISTS["names"].items() for name in names}
PEOPLES = frozenset(_LISTS["names"]["people or language"])
