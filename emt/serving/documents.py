"""The routes of documents: list, read, write and remove."""

from __future__ import annotations

import asyncio
import json
import threading
import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from emt.errors import DocumentError
from emt.serving.errors import ServingError, bad_request
from emt.serving.keys import Access, access_of, writing_access_of
from emt.serving.limits import Limits
from emt.serving.reading import committed
from emt.serving.served import Served, served_of
from memory_backends.catalog import Catalog
from memory_backends.catalog.metadata import check_metadata
from memory_backends.layout import Metadata

router = APIRouter(prefix="/v1/documents", tags=["documents"])

MetadataJSON = dict[str, StrictStr | StrictBool | StrictInt | StrictFloat]
_Access = Annotated[Access, Depends(access_of)]
_WritingAccess = Annotated[Access, Depends(writing_access_of)]
_Served = Annotated[Served, Depends(served_of)]


class NewDocument(BaseModel):
    """A document that is written."""

    model_config = ConfigDict(extra="forbid")

    text: StrictStr
    metadata: MetadataJSON = Field(default_factory=dict)


class DocumentObject(BaseModel):
    """What is known of a document."""

    object: Literal["document"] = "document"
    name: str
    num_tokens: int
    num_characters: int | None = Field(description="null: it was written as token ids")
    metadata: dict[str, Any]


class DocumentText(DocumentObject):
    """A document with a part of its text."""

    start: int = Field(description="of the part, in characters")
    end: int
    text: str | None


class DocumentWritten(DocumentObject):
    """A document, and what writing it did."""

    status: Literal["added", "replaced", "skipped"]


class DocumentList(BaseModel):
    """A page of documents, by name."""

    object: Literal["list"] = "list"
    data: list[DocumentObject]
    has_more: bool


class DocumentDeleted(BaseModel):
    """A document that was removed."""

    object: Literal["document"] = "document"
    name: str
    deleted: Literal[True] = True


@router.get("")
def list_documents(
    served: _Served,
    access: _Access,
    query: Annotated[str, Query(description="text in the names, in any case")] = "",
    where: Annotated[str | None, Query(description="metadata asked for, as JSON")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(description="the last name of the page before")] = "",
) -> DocumentList:
    """List the documents by name, a page at a time."""
    asked, wanted = _json_object(where, "where"), query.casefold()
    with committed(served.memory) as catalog, _told_of("where"):
        stored_names = access.documents(catalog, asked)
        names = sorted(name for name in stored_names if name > after and wanted in name.casefold())
        described = [_describe(catalog, name, stored_names[name]) for name in names[:limit]]
    return DocumentList(data=described, has_more=len(names) > limit)


@router.get("/{name:path}")
def read_document(
    name: str,
    served: _Served,
    access: _Access,
    start: Annotated[int, Query(ge=0, le=2**53, description="the first character")] = 0,
    end: Annotated[int | None, Query(ge=0, le=2**53, description="one after the last")] = None,
) -> DocumentText:
    """Return a document with a part of its text: to the end of it, or as much as one answer has."""
    most = served.limits.max_text_characters
    if end is None:
        end = start + most
    if not 0 <= end - start <= most:
        raise bad_request(
            f"end must be start to start + {most}; got {start} to {end}. Ask for parts.", "end"
        )
    with committed(served.memory) as catalog:
        stored = access.stored_name(catalog, name)
        if stored is None:
            raise _not_found(name)
        described, text = _describe(catalog, name, stored), catalog.document(stored).text
    part = None if text is None else text[start:end]
    end = start + len(part or "")
    return DocumentText(**described.model_dump(), start=start, end=end, text=part)


@router.put(
    "/{name:path}",
    responses={201: {"model": DocumentWritten}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": NewDocument.model_json_schema()},
                "text/plain": {"schema": {"type": "string", "minLength": 1}},
            },
        }
    },
)
async def write_document(
    name: str,
    request: Request,
    response: Response,
    served: _Served,
    access: _WritingAccess,
    metadata: Annotated[str | None, Query(description="as JSON, for a text/plain body")] = None,
) -> DocumentWritten:
    """Write a document, in place of the one of that name, if there is another one.

    The body is its text, or JSON with its text and metadata.
    """
    check_name(name, served.limits)
    with served.writer.slot():
        new = await _new_document(request, metadata, served.limits)
        with _told_of("metadata"):
            _check_size(check_metadata(new.metadata, name), served.limits)
        stamped = access.stamped(new.metadata)
        async with _gone(request) as cancelled:
            with _told_of("text"):
                written = await served.writer.write(
                    name, new.text, stamped, access, cancelled=cancelled
                )
    response.status_code = 201 if written.status == "added" else 200
    return DocumentWritten(
        name=name,
        num_tokens=written.num_tokens,
        num_characters=len(new.text),
        metadata=dict(stamped),
        status=written.status,
    )


@router.delete("/{name:path}")
async def remove_document(name: str, served: _Served, access: _WritingAccess) -> DocumentDeleted:
    """Remove a document."""
    if not await served.writer.remove(name, access):
        raise _not_found(name)
    return DocumentDeleted(name=name)


def _describe(catalog: Catalog, name: str, stored: str) -> DocumentObject:
    num_tokens, num_characters = catalog.lengths(stored)
    return DocumentObject(
        name=name,
        num_tokens=num_tokens,
        num_characters=num_characters,
        metadata=dict(catalog.metadata(stored)),
    )


async def _new_document(request: Request, metadata: str | None, limits: Limits) -> NewDocument:
    """Read the body of a request in the time that a request has."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if kind not in ("application/json", "text/plain"):
        raise ServingError(
            415, "A document must come as text/plain or application/json; say which it is."
        )
    charset = parameters.partition("charset=")[2].strip().strip('"').lower()
    if charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise ServingError(415, "A document must come as UTF-8.")
    if kind == "application/json" and metadata is not None:
        raise bad_request("Metadata of a JSON body must be in the body.", "metadata")
    try:
        async with asyncio.timeout(limits.max_seconds):
            body = await request.body()
    except TimeoutError:
        raise ServingError(408, "The body of the request took too long to come.") from None
    return await asyncio.to_thread(_parsed, body, kind, metadata)


def _parsed(body: bytes, kind: str, metadata: str | None) -> NewDocument:
    try:
        if kind == "application/json":
            return NewDocument.model_validate_json(body)
        text = body.decode("utf-8-sig")
        return NewDocument(text=text, metadata=_json_object(metadata, "metadata") or {})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = [str(part) for part in first["loc"][:2]]
        message = f"{'.'.join(place) or 'body'}: {first['msg']}"
        raise bad_request(message, place[0] if place else None) from None
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8 at byte {error.start}. Convert it.") from None


def _json_object(text: str | None, param: str) -> dict[str, Any] | None:
    """Return the JSON object of a parameter; None if it is not given."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad_request(f'{param} must be a JSON object, such as {{"user": "ann"}}.', param)
    return value


def _check_size(metadata: Metadata, limits: Limits) -> None:
    num_bytes = len(json.dumps(dict(metadata)).encode())
    if num_bytes > limits.max_metadata_bytes:
        raise bad_request(
            f"metadata must be at most {limits.max_metadata_bytes} bytes of JSON; got {num_bytes}.",
            "metadata",
        )


@contextmanager
def _told_of(param: str) -> Iterator[None]:
    """Name the field of the request that the memory refuses."""
    try:
        yield
    except DocumentError as error:
        raise bad_request(str(error), param) from None


def check_name(name: str, limits: Limits, param: str = "name") -> None:
    """Refuse a name that a URL, a list or a terminal would show as something else.

    Raises:
        ServingError: 400, naming `param`.
    """
    if not 0 < len(name) <= limits.max_name_characters:
        raise bad_request(
            f"A document's name must have 1 to {limits.max_name_characters} characters; "
            f"got {len(name)}.",
            param,
        )
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise bad_request("A document's name must have no control characters.", param)
    if "\ufffd" in name:
        raise bad_request("A document's name must be UTF-8, percent-encoded.", param)
    if any(part in ("", ".", "..") for part in name.split("/")) or name != name.strip():
        raise bad_request(
            "A document's name must not begin or end with a space or '/', nor have '//' or a part "
            "that is '.' or '..'.",
            param,
        )


@asynccontextmanager
async def _gone(request: Request) -> AsyncIterator[threading.Event]:
    """Tell in a `with` block whether the client has gone away; its body has been read."""
    event = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        event.set()

    watching = asyncio.create_task(watch())
    try:
        yield event
    finally:
        watching.cancel()


def _not_found(name: str) -> ServingError:
    return ServingError(404, f"There is no document {name!r:.200}.", param="name")
