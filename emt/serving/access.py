"""`Access`: what a request may see and write, and what its documents are called.

Two keys must not learn of each other's documents by a name that is taken. So a key with a scope
writes into a name space of its own: what it calls "notes" is "user=ann/notes" in the store, and it
is told "notes" wherever the document is named. What was written otherwise and is in its scope, by
`emt index --metadata user=ann` for instance, has the name that it has in the store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from emt.errors import DocumentError
from emt.serving.errors import ServingError, bad_request
from memory_backends.catalog import Catalog
from memory_backends.catalog.metadata import check_where, matches
from memory_backends.layout import Metadata, MetadataValue


@dataclass(frozen=True)
class Access:
    """What a request may see and write.

    Attributes:
        where: the metadata of documents that it sees, and of those that it writes; empty for all.
        can_write: whether it may write and remove documents.
        name: of its key, for logs.
    """

    where: Mapping[str, Any] = field(default_factory=dict)
    can_write: bool = True
    name: str = ""

    @property
    def is_scoped(self) -> bool:
        """Whether there may be documents that it does not see."""
        return bool(self.where)

    def scope(
        self,
        catalog: Catalog,
        documents: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the settings of `Memory.using` with which a request is answered.

        Args:
            catalog: of the memory, as it is when the request is answered.
            documents: the names that the request gives; None for all that it may see.
            where: the metadata that it asks for; None for any.

        Raises:
            DocumentError: a name is unknown, or not to be seen; `where` is not a filter.
        """
        settings: dict[str, Any] = {}
        if documents is not None:
            settings["documents"] = [self._existing(catalog, name) for name in documents]
        narrowed = self.narrowed(where)
        if narrowed:
            settings["where"] = narrowed
        return settings

    def narrowed(self, where: Mapping[str, Any] | None) -> dict[str, list[MetadataValue]]:
        """Return the filter of what a request asks for and may see; empty for everything.

        Raises:
            DocumentError: `where` is not a filter.
        """
        both = check_where(self.where)
        for key, values in check_where({} if where is None else where).items():
            own = both.get(key, values)
            both[key] = [value for value in values if matches({key: value}, {key: own})]
        return both

    def stored_name(self, catalog: Catalog, name: str) -> str | None:
        """Return what a document is called in the store; None if there is none to be seen."""
        for stored in dict.fromkeys((name, self._namespace + name)):
            if self.sees(catalog, stored) and self.shown_name(catalog, stored) == name:
                return stored
        return None

    def new_name(self, catalog: Catalog, name: str) -> str:
        """Return what a document that is written is called in the store.

        Raises:
            ServingError: 409, the name in the store is taken, by what somebody who sees everything
                wrote in the key's name space.
        """
        stored = self.stored_name(catalog, name)
        if stored is not None:
            return stored
        stored = self._namespace + name
        if catalog.has_document(stored):
            raise ServingError(
                409, "A document of this name cannot be written. Choose another name.", param="name"
            )
        return stored

    def shown_name(self, catalog: Catalog, stored: str) -> str:
        """Return what a document of the store is called in an answer."""
        name = stored.removeprefix(self._namespace)
        return stored if name != stored and self.sees(catalog, name) else name

    def documents(self, catalog: Catalog, where: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Return what the documents to be seen are called: in an answer -> in the store.

        Args:
            catalog: of the memory.
            where: the metadata that the request asks for; None for any.

        Raises:
            DocumentError: `where` is not a filter.
        """
        metadata, own, asked = catalog.all_metadata(), check_where(self.where), self.narrowed(where)
        seen = {name for name in catalog.document_names() if matches(metadata.get(name, {}), own)}
        names = {}
        for stored in seen:
            if matches(metadata.get(stored, {}), asked):
                name = stored.removeprefix(self._namespace)
                names[stored if name in seen else name] = stored
        return names

    def sees(self, catalog: Catalog, stored: str) -> bool:
        """Tell whether there is a document of this name in the store, in the scope."""
        try:
            return matches(catalog.metadata(stored), check_where(self.where))
        except DocumentError:
            return False

    def stamped(self, metadata: Metadata) -> Metadata:
        """Return the metadata with which a document is written, in the scope.

        Raises:
            ServingError: it would not be in the scope, or the scope leaves open where in it.
        """
        stamped = dict(metadata)
        for key, allowed in check_where(self.where).items():
            if key not in stamped:
                if len(allowed) > 1:
                    raise bad_request(
                        f"metadata must have {key!r}: this key writes documents with one of "
                        f"{allowed}.",
                        param="metadata",
                    )
                stamped[key] = allowed[0]
            elif not matches({key: stamped[key]}, {key: allowed}):
                raise ServingError(
                    403,
                    f"This key writes documents with {key!r} {' or '.join(map(repr, allowed))}; "
                    f"got {stamped[key]!r:.80}. Leave it out.",
                    param="metadata",
                )
        return stamped

    @property
    def _namespace(self) -> str:
        """What names in the store begin with; no other scope's begins so, for `/` ends it."""
        if not self.where:
            return ""
        parts = (
            f"{quote(key, safe='')}={'|'.join(map(_quoted, values))}"
            for key, values in sorted(check_where(self.where).items())
        )
        return "&".join(parts) + "/"

    def _existing(self, catalog: Catalog, name: str) -> str:
        stored = self.stored_name(catalog, name)
        if stored is None:
            raise DocumentError(f"no document {name!r:.200} in this memory.")
        return stored


def _quoted(value: MetadataValue) -> str:
    """Return a value in a name: text as it is, but for text that would be another value's."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            return quote(value, safe="")
    return quote(json.dumps(value), safe="")
