"""The routes of documents: list, read, write and remove."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from emt.errors import DocumentError
from emt.serving.errors import ServingError, bad_request
from emt.serving.keys import Access, access_of, writing_access_of
from emt.serving.limits import Limits
from emt.serving.reading import committed
from emt.serving.schemas import errors
from emt.serving.served import Served, served_of
from memory_backends.catalog import Catalog
from memory_backends.catalog.metadata import check_metadata
from memory_backends.layout import Metadata

router = APIRouter(prefix="/v1/documents", tags=["documents"])

_ERRORS = errors(400, 401, 403, 404, 408, 409, 413, 415, 499, 500, 503)
_MOST_NAME = 512  # characters
# A name has parts between slashes, none of them "." or "..", and no control characters, which a
# URL, a list or a terminal would show as something else. U+FFFD stands for what was no UTF-8.
_NO = r"\u0000-\u001f\u007f-\u009f\u2028\u2029\ufffd/"
_PART = rf"(?:[^.{_NO}][^{_NO}]*|\.[^.{_NO}][^{_NO}]*|\.\.[^{_NO}]+)"
_NAME = rf"^{_PART}(?:/{_PART})*$"

_Int64 = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
_Value = StrictStr | StrictBool | _Int64 | StrictFloat
MetadataJSON = dict[Annotated[str, Field(min_length=1)], _Value]
WhereJSON = dict[str, _Value | list[_Value]]
_Access = Annotated[Access, Depends(access_of)]
_WritingAccess = Annotated[Access, Depends(writing_access_of)]
_Served = Annotated[Served, Depends(served_of)]


class NewDocument(BaseModel):
    """A document that is written."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[StrictStr, Field(json_schema_extra={"pattern": r"\S"})]
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


def _json_parameter(name: str, kind: Any) -> dict[str, Any]:
    """Describe a parameter of a URL that is JSON."""
    content = {"application/json": {"schema": TypeAdapter(kind).json_schema()}}
    return {"parameters": [{"name": name, "in": "query", "content": content}]}


@router.get("", responses=_ERRORS, openapi_extra=_json_parameter("where", WhereJSON))
def list_documents(
    served: _Served,
    access: _Access,
    query: Annotated[str, Query(description="text in the names, in any case")] = "",
    where: Annotated[str | None, Query(include_in_schema=False)] = None,
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


@router.get("/{name:path}", responses=_ERRORS)
def read_document(
    name: str,
    served: _Served,
    access: _Access,
    start: Annotated[int, Query(ge=0, le=2**53, description="the first character")] = 0,
    end: Annotated[int | None, Query(ge=0, le=2**53, description="one after the last")] = None,
) -> DocumentText:
    """Return a document with a part of its text, as much of it as one answer may have.

    The answer says where its part ends.
    """
    most = start + served.limits.max_text_characters
    with committed(served.memory) as catalog:
        stored = access.stored_name(catalog, name)
        if stored is None:
            raise _not_found(name)
        described, text = _describe(catalog, name, stored), catalog.document(stored).text
    part = None if text is None else text[start : most if end is None else min(end, most)]
    end = start + len(part or "")
    return DocumentText(**described.model_dump(), start=start, end=end, text=part)


@router.put(
    "/{name:path}",
    responses={201: {"model": DocumentWritten}, **_ERRORS},
    openapi_extra={
        **_json_parameter("metadata", MetadataJSON),
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": NewDocument.model_json_schema()},
                "text/plain": {"schema": {"type": "string", "pattern": r"\S"}},
            },
        },
    },
)
async def write_document(
    name: Annotated[
        str, Path(json_schema_extra={"pattern": _NAME, "minLength": 1, "maxLength": _MOST_NAME})
    ],
    request: Request,
    response: Response,
    served: _Served,
    access: _WritingAccess,
    metadata: Annotated[str | None, Query(include_in_schema=False)] = None,
) -> DocumentWritten:
    """Write a document, in place of the one of that name, if there is another one.

    The body is its text, or JSON with its text and metadata. Metadata may also be in the URL, for
    text; of a key in both, the body's counts.
    """
    check_name(name)
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


@router.delete("/{name:path}", responses=_ERRORS)
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
    try:
        async with asyncio.timeout(limits.max_seconds):
            body = await request.body()
    except TimeoutError:
        raise ServingError(408, "The body of the request took too long to come.") from None
    more = _json_object(metadata, "metadata") or {}
    return await asyncio.to_thread(_parsed, body, kind, more)


def _parsed(body: bytes, kind: str, metadata: Mapping[str, Any]) -> NewDocument:
    try:
        if kind == "application/json":
            new = NewDocument.model_validate_json(body)
        else:
            new = NewDocument(text=body.decode("utf-8-sig"))
        return NewDocument(text=new.text, metadata={**metadata, **new.metadata})
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


def check_name(name: str, param: str = "name") -> None:
    """Refuse a name that a URL, a list or a terminal would show as something else.

    Raises:
        ServingError: 400, naming `param`.
    """
    if not re.fullmatch(_NAME, name) or len(name) > _MOST_NAME:
        raise bad_request(
            f"A document's name must be UTF-8, with 1 to {_MOST_NAME} characters, no control "
            "characters, and no part between slashes that is empty, '.' or '..'; got "
            f"{name!r:.100}.",
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
