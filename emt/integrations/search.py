"""Searching for passages' texts, with a memory in this process or a server's: for retrievers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from emt.citations.citing import quoted
from emt.errors import ConfigError, EMTError
from emt.memory.memory import Memory
from emt.model.chat import prompt_ids


class SearchError(EMTError, OSError):
    """A server that cannot be reached, or that refuses a search."""


class FoundPassage(NamedTuple):
    """A passage that a query is about.

    Attributes:
        document: the name.
        start: its first character, and `end` the one after its last; None for a document that was
            written as token ids.
        text: what it says.
        score: 0 to 1; None if nothing tells.
    """

    document: str
    start: int | None
    end: int | None
    text: str
    score: float | None

    @property
    def metadata(self) -> dict[str, Any]:
        """Where it stands and how it scored, for other libraries' documents."""
        return {"source": self.document, "start": self.start, "end": self.end, "score": self.score}


class PassageSearch(Protocol):
    """Finds the passages that a query is about, best first; none if nothing is relevant."""

    def __call__(self, query: str) -> list[FoundPassage]:
        """Search.

        Raises:
            EMTError: as the class says.
        """


class MemorySearch:
    """Searches a memory in this process, one query at a time.

    Args:
        memory: of an attached model with a tokenizer.
        **settings: of `Memory.using`, such as documents, where, max_passages and passage_rows.

    Raises:
        ConfigError: the memory has no tokenizer; when it is called, a setting is wrong.
        DocumentError: when it is called: a document is unknown.
    """

    def __init__(self, memory: Memory, **settings: Any) -> None:
        if memory.tokenizer is None:
            raise ConfigError("this memory has no tokenizer. Give attach() the model's.")
        self._memory, self._tokenizer = memory, memory.tokenizer
        self._settings = settings

    def __call__(self, query: str) -> list[FoundPassage]:
        """Search; see the class for errors."""
        memory = self._memory
        with memory.using(**self._settings):
            routed = memory.route(prompt_ids(self._tokenizer, query).tolist())
        found = []
        for each in routed.passages:
            document = memory.backend.catalog.document(each.passage.document)
            tokens = document.row_tokens[each.passage.first : each.passage.stop]
            span = int(tokens[0]), int(tokens[-1]) + 1
            start, end, text = quoted(document, *span, self._tokenizer)
            found.append(FoundPassage(document.name, start, end, text, each.score))
        return found


class ServerSearch:
    """Searches the memory of an `emt serve`, by `POST /v1/search`; threads may share it.

    Args:
        url: of the server, as `http://localhost:8000` or with `/v1`.
        api_key: a key of it, if it has keys.
        timeout: seconds.
        documents: names of those that may be found; None for all.
        where: metadata that they must have; None for any.
        max_passages: instead of the server's.
        passage_rows: instead of the server's.

    Raises:
        ConfigError: the url is not of http or https.
        SearchError: when it is called: no answer, or a refusal, with what the server says.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        documents: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        max_passages: int | None = None,
        passage_rows: int | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url must begin with http:// or https://; got {url!r:.100}.")
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1/search"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._wanted = {
            "documents": None if documents is None else list(documents),
            "where": None if where is None else dict(where),
            "max_passages": max_passages,
            "passage_rows": passage_rows,
        }

    def __call__(self, query: str) -> list[FoundPassage]:
        """Search; see the class for errors."""
        body = json.dumps({"query": query, **self._wanted}).encode()
        request = urllib.request.Request(self._url, body, self._headers)  # POST: it has a body
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                passages = json.load(answer)["data"]
            return [FoundPassage(**passage) for passage in passages]
        except urllib.error.HTTPError as error:
            raise SearchError(f"'{self._url}' answers {error.code}: {_message(error)}") from error
        except OSError as error:  # URLError, too, and time-outs
            reason = getattr(error, "reason", error)
            raise SearchError(f"'{self._url}' cannot be reached: {reason}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise SearchError(f"'{self._url}' does not answer as emt serve does.") from error


def _message(error: urllib.error.HTTPError) -> str:
    """Return what a server's refusal says."""
    text = error.read(10_000).decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text or str(error.reason)
