"""Requests to prompts: tokens of chats and texts, checked against what the model takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from emt.errors import ConfigError
from emt.ingest.documents import is_utf8
from emt.model.chat import chat_ids, prompt_ids
from emt.model.positions import max_positions
from emt.serving.documents import check_name
from emt.serving.errors import ServingError, bad_request
from emt.serving.keys import Access
from emt.serving.prompt import Prompt
from emt.serving.remembering import ConversationRequest
from emt.serving.sampling import Sampling
from emt.serving.schemas import ChatRequest, CompletionRequest, GenerationRequest
from emt.serving.served import Served
from emt.serving.unsupported import refuse_unsupported

_COMPLETION_TOKENS = 16  # OpenAI's own default for texts


async def prompts_of_chat(served: Served, body: ChatRequest, access: Access) -> list[Prompt]:
    """Return the prompt of a chat.

    Raises:
        ServingError: 400, naming the field.
    """
    refuse_unsupported(body.model_extra)
    messages = [
        ("system" if message.role == "developer" else message.role, message.text)
        for message in body.messages
    ]
    _check_text("messages", *(text for _, text in messages))

    def encode() -> list[int]:
        if not served.tokenizer.chat_template:  # as `emt generate`: a plain text
            text = "\n\n".join(text for _, text in messages)
            return list(prompt_ids(served.tokenizer, text, chat=False).tolist())
        return list(chat_ids(served.tokenizer, messages).tolist())

    try:
        token_ids = await _encoded(served, encode)
    except ConfigError as error:
        raise bad_request(str(error), param="messages") from error
    if not token_ids:  # a model without a template, or one that begins with nothing
        raise bad_request("The messages are empty. Ask something.", param="messages")
    conversation = None
    if body.memory.conversation is not None:
        said = [text for role, text in messages if role == "user"]
        if messages[-1][0] != "user":
            raise bad_request("The last message must be the user's to be remembered.", "messages")
        check_name(body.memory.conversation, "memory.conversation")
        conversation = ConversationRequest(body.memory.conversation, said)
    return [
        _prompt(
            served,
            body,
            access,
            token_ids,
            served.limits.max_new_tokens,
            "messages",
            is_chat=True,
            conversation=conversation,
        )
    ]


async def prompts_of_texts(served: Served, body: CompletionRequest, access: Access) -> list[Prompt]:
    """Return the prompts of texts or token ids.

    Raises:
        ServingError: 400, naming the field.
    """
    refuse_unsupported(body.model_extra)
    texts = body.prompts
    num_answers = len(texts) * (body.n or 1)
    if num_answers > served.limits.max_batch:
        raise bad_request(
            f"A request may ask for {served.limits.max_batch} answers; got {len(texts)} prompts "
            f"with n={body.n or 1}. Send several requests.",
            param="prompt",
        )
    prompts = []
    for text in texts:
        if isinstance(text, str):
            _check_text("prompt", text)

            def encode(text: str = text) -> list[int]:
                return list(prompt_ids(served.tokenizer, text, chat=False).tolist())

            token_ids = await _encoded(served, encode)
        else:
            token_ids = _checked_ids(served, text)
        prompts.append(
            _prompt(served, body, access, token_ids, _COMPLETION_TOKENS, "prompt", is_chat=False)
        )
    return prompts


async def _encoded(served: Served, encode: Any) -> list[int]:
    """Run a tokenizer beside the event loop: a long text takes a while."""
    async with served.encoding:
        token_ids: list[int] = await asyncio.to_thread(encode)
        return token_ids


def _prompt(
    served: Served,
    body: GenerationRequest,
    access: Access,
    token_ids: Sequence[int],
    default_tokens: int,
    param: str,
    *,
    is_chat: bool,
    conversation: ConversationRequest | None = None,
) -> Prompt:
    memory, n = body.memory, body.n or 1
    if n > served.limits.max_batch:
        raise bad_request(f"n must be at most {served.limits.max_batch}; got {n}.", param="n")
    _check_remembering(body, access, is_chat=is_chat)
    settings = {"enabled": memory.enabled, "mode": memory.mode}
    return Prompt(
        token_ids=token_ids,
        max_new_tokens=_num_new(served, body, len(token_ids), default_tokens, param),
        n=n,
        sampling=_sampling(body),
        stop=body.stops,
        is_chat=is_chat,
        settings={name: value for name, value in settings.items() if value is not None},
        documents=memory.documents,
        where=memory.where,
        access=access,
        by_token=memory.tokens,
        conversation=conversation,
    )


def _check_remembering(body: GenerationRequest, access: Access, *, is_chat: bool) -> None:
    """Refuse to remember what is no turn of a conversation.

    Raises:
        ServingError: 400; 403, the key may only read, or not see the turn.
    """
    memory = body.memory
    if memory.remember != (memory.conversation is not None):
        raise bad_request(
            "memory.remember and memory.conversation, the name of the conversation, belong "
            "together. Give both or none.",
            "memory.remember",
        )
    if not memory.remember:
        return
    if not is_chat or (body.n or 1) > 1:
        raise bad_request("Only one answer of a chat can be remembered.", "memory.remember")
    if not access.can_write:
        raise ServingError(403, "This key may not write documents.", code="read_only")
    access.stamped({"conversation": str(memory.conversation), "turn": 1, "time": 0.0})


def _sampling(body: GenerationRequest) -> Sampling:
    """Return how tokens are chosen: greedily, unless the request says or implies otherwise."""
    default = 0.0 if body.top_p is None and (body.n or 1) == 1 else 1.0
    temperature = default if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return Sampling(temperature, top_p, None if body.seed is None else body.seed % 2**63)


def _num_new(
    served: Served, body: GenerationRequest, num_prompt: int, default: int, param: str
) -> int:
    """Return how many tokens an answer may have.

    Raises:
        ServingError: 400, there is no room for them.
    """
    limits, wanted = served.limits, body.wanted_tokens
    if wanted is not None and wanted > limits.max_new_tokens:
        raise bad_request(
            f"max_tokens must be at most {limits.max_new_tokens} on this server; got {wanted}.",
            param="max_tokens",
        )
    positions = max_positions(served.model.config.get_text_config())
    most = limits.max_batch_tokens // (body.n or 1)
    room = most if positions is None else min(positions, most)
    if num_prompt + (wanted or 1) > room:
        raise ServingError(
            400,
            f"The prompt's {num_prompt} tokens and {wanted or 1} new ones must fit {room} tokens. "
            "Shorten the prompt, or put it as a document.",
            param=param,
            code="context_length_exceeded",
        )
    return wanted or min(default, limits.max_new_tokens, room - num_prompt)


def _check_text(param: str, *texts: str) -> None:
    if not all(map(is_utf8, texts)):
        raise bad_request("The text is not Unicode: it has half a surrogate pair.", param=param)


def _checked_ids(served: Served, token_ids: list[int]) -> list[int]:
    size = served.model.config.get_text_config().vocab_size
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
    if wrong is not None:
        raise bad_request(f"Token ids must be 0 to {size - 1}; got {wrong}.", param="prompt")
    return token_ids
