"""The route of search: passages, and nothing is generated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from emt.citations.citing import quoted
from emt.errors import DocumentError
from emt.ingest.documents import is_utf8
from emt.model.chat import prompt_ids
from emt.passage import RoutedPassage
from emt.serving.documents import WhereJSON
from emt.serving.errors import ServingError, bad_request
from emt.serving.keys import Access, access_of
from emt.serving.schemas import errors
from emt.serving.served import Served, served_of

router = APIRouter(prefix="/v1/search", tags=["search"])


class SearchRequest(BaseModel):
    """What is searched for, and where."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(min_length=1, json_schema_extra={"pattern": r"\S"})
    documents: list[str] | None = None
    where: WhereJSON | None = None
    max_passages: int | None = Field(None, ge=1, le=100)
    passage_rows: int | None = Field(None, ge=1, le=2**16, description="rows of all passages")


class PassageObject(BaseModel):
    """A passage of a document; the score is 0 to 1."""

    document: str
    start: int | None = Field(description="its first character; null: written as token ids")
    end: int | None
    text: str
    score: float | None


class SearchResult(BaseModel):
    """Passages, best first; `relevance` in nats a token that the query gains by them."""

    object: Literal["list"] = "list"
    data: list[PassageObject]
    relevance: float | None
    missing_shards: list[int] = Field([], description="of the memory's, that did not answer")


@router.post("", responses=errors(400, 401, 404, 413, 500, 503))
async def search(
    wanted: SearchRequest,
    served: Annotated[Served, Depends(served_of)],
    access: Annotated[Access, Depends(access_of)],
) -> SearchResult:
    """Find the passages that a query is about."""
    if not wanted.query.strip() or not is_utf8(wanted.query):
        raise bad_request("query must be text, and not empty.", "query")
    return await served.engine.run(_search, served, access, wanted)


def _search(served: Served, access: Access, wanted: SearchRequest) -> SearchResult:
    memory = served.memory
    memory.refresh()  # what another process has written
    num_rows = wanted.passage_rows or memory.config.passage_rows
    num_passages = wanted.max_passages or memory.config.max_passages
    settings: dict[str, Any] = {
        "passage_rows": num_rows,
        "max_passages": min(num_passages, num_rows),  # each has a row
    }
    try:
        settings |= access.scope(memory.backend.catalog, wanted.documents, wanted.where)
    except DocumentError as error:
        raise ServingError(404, str(error), param="documents") from None
    with memory.using(**settings):
        routed = memory.route(prompt_ids(served.tokenizer, wanted.query).tolist())
    passages = [_described(served, access, each) for each in routed.passages]
    return SearchResult(
        data=passages,
        relevance=routed.relevance,
        missing_shards=list(memory.missing_shards),
    )


def _described(served: Served, access: Access, routed: RoutedPassage) -> PassageObject:
    """Return a passage with its text."""
    passage, catalog = routed.passage, served.memory.backend.catalog
    document = catalog.document(passage.document)
    tokens = document.row_tokens[passage.first : passage.stop]
    start, end, text = quoted(
        document, int(tokens[0]), int(tokens[-1]) + 1, served.memory.tokenizer
    )
    name = access.shown_name(catalog, passage.document)
    return PassageObject(document=name, start=start, end=end, text=text, score=routed.score)
