"""A fact changed in a text: where the true answer stands, and what stands there instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Rejected(Exception):  # noqa: N818 - an outcome, not a mistake
    """A question that makes no item; `reason` is a line of the report."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Edit(NamedTuple):
    """Characters `start` to `stop` of a text become `text`."""

    start: int
    stop: int
    text: str

    @property
    def growth(self) -> int:
        """How much longer the text gets."""
        return len(self.text) - (self.stop - self.start)


class Change(Protocol):
    """One fact replaced by another of its type."""

    def edits(self, text: str) -> list[Edit]:
        """Return what to change in a text, in order, without overlaps: every occurrence.

        Raises:
            Rejected: an occurrence may mean something else.
        """

    def back(self) -> Change:
        """Return the opposite change: its edits are where the new answer stands."""


def apply(text: str, edits: Sequence[Edit]) -> str:
    """Return the text with the edits made."""
    parts, end = [], 0
    for edit in edits:
        parts += [text[end : edit.start], edit.text]
        end = edit.stop
    return "".join([*parts, text[end:]])
