"""Who asks: the keys of a server, and what each may see and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request


@dataclass(frozen=True)
class Access:
    """What a request may see and write.

    Attributes:
        where: the metadata of documents that it sees, and of those that it writes.
        can_write: whether it may write and remove documents.
    """

    where: Mapping[str, Any] = field(default_factory=dict)
    can_write: bool = True

    def scope(
        self, documents: Sequence[str] | None = None, where: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the settings of `Memory.using` with which a request is answered."""
        settings = {"documents": documents, "where": where}
        return {name: value for name, value in settings.items() if value is not None}


class Keys:
    """The keys of a server."""

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a file of keys."""
        raise NotImplementedError


async def access_of(request: Request) -> Access:
    """Return what a request may see and write: a dependency of every route but /health."""
    return Access()
