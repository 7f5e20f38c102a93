"""Changed facts of one article, joined: one version of its text that answers several questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from experiments.items import Item

_AROUND = 40  # characters on each side of an answer that must be in the joined version, too


def joined_versions(items: Sequence[Item]) -> list[Item]:
    """Let items of one article have one document: in one memory, versions would contradict.

    The first item's document stands. The change of each further item is made in it, too, if what
    stands around the answer is the same, no original answer is left behind, and what other items
    ask about is still as they say; else the item is left out.

    Returns:
        The items that are left, in order, all items of one title with the same context.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.title, []).append(item)
    joined: dict[str, Item] = {}
    for group in groups.values():
        text, kept = group[0].context, group[:1]
        for item in group[1:]:
            changed = _with_change(text, item)
            is_new = item.question not in [other.question for other in kept]
            if changed is not None and is_new and all(_holds(changed, other) for other in kept):
                text, kept = changed, [*kept, item]
        joined |= {item.id: replace(item, context=text) for item in kept}
    return [joined[item.id] for item in items if item.id in joined]


def _with_change(text: str, item: Item) -> str | None:
    """Make the change of an item in another version of its article; None if it cannot be made.

    A version in which it is made already stays as it is.
    """
    original, changed = item.original_answer, text
    if item.context == text:
        return text
    if not _holds(text, item):
        if original is None or _count(text, item.answer) or not _count(text, original):
            return None
        changed = re.sub(_pattern(original), lambda _: item.answer, text)
        if not _holds(changed, item):  # the original stands in other letters somewhere
            return None
    places = re.finditer(_pattern(item.answer), item.context)
    around = (item.context[max(at.start() - _AROUND, 0) : at.end() + _AROUND] for at in places)
    return changed if any(passage in changed for passage in around) else None


def _holds(text: str, item: Item) -> bool:
    """Tell whether a text states an item's answer, and not the original one."""
    original = item.original_answer
    return _count(text, item.answer) > 0 and (original is None or not _count(text, original))


def _count(text: str, answer: str) -> int:
    return len(re.findall(_pattern(answer), text, flags=re.IGNORECASE))


def _pattern(answer: str) -> str:
    return rf"(?<!\w){re.escape(answer)}(?!\w)"
