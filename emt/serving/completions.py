"""`/v1/chat/completions` and `/v1/completions`: OpenAI's API, with the sources of each answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from emt.serving.asking import Asking, ClientGoneError, unless_gone
from emt.serving.errors import as_serving_error
from emt.serving.keys import Access, access_of
from emt.serving.models import check_model
from emt.serving.prompt import Answered, Prompt
from emt.serving.prompts import prompts_of_chat, prompts_of_texts
from emt.serving.schemas import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    GenerationRequest,
    errors,
)
from emt.serving.served import Served, served_of
from emt.serving.shape import Shape

router = APIRouter(prefix="/v1", tags=["answers"])
_ERRORS = errors(400, 401, 403, 404, 413, 500, 503, 504)
_EVENTS: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
_CLIENT_GONE = 499  # nobody reads it; for the figures


@router.post(
    "/chat/completions",
    response_model=ChatResponse,
    responses={200: {"content": _EVENTS}, **_ERRORS},
)
async def chat(
    request: Request,
    body: ChatRequest,
    access: Annotated[Access, Depends(access_of)],
    served: Annotated[Served, Depends(served_of)],
) -> Response:
    """Answer a chat."""
    check_model(served, body.model)
    prompts = await prompts_of_chat(served, body, access)
    return await _respond(request, served, body, prompts, is_chat=True)


@router.post(
    "/completions",
    response_model=CompletionResponse,
    responses={200: {"content": _EVENTS}, **_ERRORS},
)
async def complete(
    request: Request,
    body: CompletionRequest,
    access: Annotated[Access, Depends(access_of)],
    served: Annotated[Served, Depends(served_of)],
) -> Response:
    """Go on from texts."""
    check_model(served, body.model)
    prompts = await prompts_of_texts(served, body, access)
    return await _respond(request, served, body, prompts, is_chat=False)


async def _respond(
    request: Request,
    served: Served,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    *,
    is_chat: bool,
) -> Response:
    shape = Shape(is_chat=is_chat, model=served.model_name)
    asking = Asking(served, prompts)
    try:
        if not body.stream:
            answered = await unless_gone(request, asking.answered())
            remembered = await _remember(served, prompts, answered)
            usage = _usage(served, prompts, answered)
            answers = [answer for each in answered for answer in each.answers]
            return JSONResponse(shape.response(answers, usage, **remembered))
        chunks = _chunks(asking, shape, served, body, prompts)
        # An error that comes before the first text has its status.
        first = await unless_gone(request, anext(chunks))
    except ClientGoneError:
        asking.cancel()
        return Response(status_code=_CLIENT_GONE)
    except BaseException:
        asking.cancel()
        raise
    return StreamingResponse(
        _events(first, chunks, asking),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(
    first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]], asking: Asking
) -> AsyncIterator[str]:
    """Yield server-sent events; an error is the last one."""
    try:
        yield _event(first)
        async for chunk in chunks:
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(as_serving_error(error).body)
    finally:
        asking.cancel()


async def _chunks(
    asking: Asking,
    shape: Shape,
    served: Served,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
) -> AsyncIterator[dict[str, Any]]:
    """Yield the parts of a stream.

    The last one with choices has `memory`, the sources of all answers. It has choices since many
    programs read `choices[0]` of every chunk.
    """
    num_each = prompts[0].n
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    answered: dict[int, Answered] = {}
    has_begun = False
    async for number, event in asking.events():
        if not has_begun:
            for choices in shape.begun(len(prompts) * num_each):
                yield shape.chunk(choices, **more)
            has_begun = True
        if isinstance(event, Answered):
            answered[number] = event
        else:
            piece = shape.piece(number * num_each + event.number, event.text)
            yield shape.chunk(piece, **more)
    settled = [answered[number] for number in range(len(prompts))]
    remembered = await _remember(served, prompts, settled)
    answers = [answer for each in settled for answer in each.answers]
    sources = [
        {"index": i, **each.sources.to_json(), **remembered} for i, each in enumerate(answers)
    ]
    for index, answer in enumerate(answers):
        memory = {"memory": sources} if index == len(answers) - 1 else {}
        yield shape.chunk(shape.ended(index, answer), **more, **memory)
    usage = _usage(served, prompts, settled)  # counts them, asked for or not
    if with_usage:
        yield shape.chunk([], usage=usage)


async def _remember(
    served: Served, prompts: Sequence[Prompt], answered: Sequence[Answered]
) -> dict[str, str | None]:
    """Write a turn before its answer ends, so that the next request finds it.

    Returns:
        What an answer says of it, `remembered`: the name of the document, or None if it is not
        written, or not yet. Nothing if the request did not ask for it.
    """
    prompt, turn = prompts[0], answered[0].answers[0].turn  # a chat, which is one prompt
    if prompt.conversation is None:
        return {}
    if turn is None:  # it only asks for what is known
        return {"remembered": None}
    return {"remembered": await served.writer.remember(turn, prompt.conversation, prompt.access)}


def _usage(
    served: Served, prompts: Sequence[Prompt], answered: Sequence[Answered]
) -> dict[str, int]:
    num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
    num_new = sum(answer.num_tokens for each in answered for answer in each.answers)
    served.metrics.count_tokens(num_prompt, num_new)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
    }


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
