"""The route of the store's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from emt.serving.keys import Access, access_of
from emt.serving.reading import committed
from emt.serving.schemas import errors
from emt.serving.served import Served, served_of

router = APIRouter(prefix="/v1/store", tags=["store"])

_INDEX_FACTS = ("factory", "num_rows", "recall")


class StoreObject(BaseModel):
    """Figures of the memory, of the documents that the key sees; and whether it may write."""

    object: Literal["store"] = "store"
    can_write: bool
    model: str
    model_type: str | None
    num_documents: int
    num_tokens: int
    num_rows: int
    num_layers: int
    memory_type: str
    mode: str = Field(description="as the settings say: token, passage or auto")
    row_codec: str
    bytes_per_row: int
    bytes: int | None = Field(description="of all files; null for a key that does not see all")
    index: dict[str, Any] | None = Field(description="likewise")
    missing_shards: list[int] = Field([], description="of a sharded store, that do not answer")


@router.get("", responses=errors(401, 500))
def figures(
    served: Annotated[Served, Depends(served_of)], access: Annotated[Access, Depends(access_of)]
) -> StoreObject:
    """Return what the memory has."""
    memory = served.memory
    with committed(memory) as catalog:
        seen = set(access.documents(catalog).values())
        sizes = [size for name, *size in catalog.document_sizes() if name in seen]
        index = catalog.setting("index") or {}
        path = None if catalog.path is None else catalog.path.parent
        return StoreObject(
            can_write=access.can_write,
            model=served.model_name,
            model_type=catalog.identity.get("model_type"),
            num_documents=len(sizes),
            num_tokens=sum(num_tokens for num_tokens, _ in sizes),
            num_rows=sum(num_rows for _, num_rows in sizes),
            num_layers=len(catalog.layout.layers),
            memory_type=memory.config.memory_type,
            mode=memory.config.mode,
            row_codec=catalog.row_codec,
            bytes_per_row=catalog.bytes_per_row,
            bytes=None if access.is_scoped or path is None else _bytes_in(path),
            index=None
            if access.is_scoped
            else {fact: index[fact] for fact in _INDEX_FACTS if fact in index},
            missing_shards=list(memory.missing_shards),
        )


def _bytes_in(folder: Path) -> int:
    """Return what the files of a store take on the disk; some are written meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:  # gone by now
            continue
    return total
