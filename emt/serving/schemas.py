"""What clients send to be answered, and the answers: OpenAI's shapes, with `memory` beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

Text = Annotated[str, Field(max_length=2**21)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]
Value = bool | int | float | str
NewText = Annotated[str, Field(min_length=1, max_length=2**21)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MemoryOptions(_Strict):
    """How the memory takes part in an answer."""

    enabled: Annotated[bool, Field(description="False asks the plain model.")] = True
    documents: Annotated[
        list[Annotated[str, Field(max_length=1024)]] | None,
        Field(max_length=10_000, description="Names of those that may be read; null for all."),
    ] = None
    where: Annotated[
        dict[str, Value | list[Value]] | None,
        Field(description="The metadata that documents must have: key to a value or several."),
    ] = None
    mode: Literal["token", "passage", "auto"] | None = None
    tokens: Annotated[bool, Field(description="Tell the sources of each token.")] = False
    remember: Annotated[
        bool, Field(description="Keep the turn as a document of the `conversation`.")
    ] = False
    conversation: Annotated[str, Field(max_length=256)] | None = None


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of requests have; other fields are accepted (see `unsupported.py`)."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[
        float | None,
        Field(
            ge=0,
            le=2,
            description="0 takes the likeliest token. The default is 0, but 1 with "
            "top_p or several answers.",
        ),
    ] = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    memory: MemoryOptions = MemoryOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that an answer ends before."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """How many tokens an answer may have; None if the request does not say."""
        return self.max_tokens


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """A chat whose next message is asked for."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """How many tokens an answer may have; None if the request does not say."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """Texts, or token ids, to go on from."""

    prompt: (
        NewText
        | Annotated[list[NewText], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else prompt


class Citation(BaseModel):
    """A sentence that an answer was copied from, or that was attended to most."""

    document: str
    start: int | None
    end: int | None
    quote: str
    score: float | None
    share: float
    copied: float


class RecalledPassage(BaseModel):
    """A passage that was recalled for a prompt."""

    document: str
    start: int | None
    end: int | None
    text: str
    score: float | None
    share: float


class TokenSource(BaseModel):
    """A place in a document that a token came from."""

    document: str
    start: int | None
    end: int | None
    share: float


class SourcedToken(BaseModel):
    """A token's text, and where it came from."""

    text: str
    sources: list[TokenSource]


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"]
    logprobs: None = None
    citations: list[Citation]
    passages: list[RecalledPassage]
    tokens: list[SourcedToken] | None = None


class AssistantMessage(BaseModel):
    """The message that was generated."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(_Choice):
    """One answer to a chat."""

    message: AssistantMessage
    remembered: Annotated[
        str | None, Field(description="the document of the turn; null: not written, or not yet")
    ] = None


class CompletionChoice(_Choice):
    """One text."""

    text: str


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Response(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class ChatResponse(_Response):
    """Answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionResponse(_Response):
    """Texts that go on from prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Error(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error, in OpenAI's shape."""

    error: Error


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the description of a route says of its errors."""
    return {status: {"model": ErrorResponse} for status in statuses}
