"""What is known of an endpoint and must not be shown: its key, and where it is."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

_SECRET_LENGTH = 16  # shorter keys are words such as "EMPTY", which answers may have


class Secrets:
    """Takes secrets out of texts: the key everywhere, the URL and its host out of errors.

    Servers repeat keys that they refuse, and proxies say what they could not reach.
    """

    __slots__ = ("_host", "_key", "_url")  # nothing that vars() shows

    def __init__(self, key: str, url: str, host: str) -> None:
        self._key, self._url, self._host = key, url, host

    def out_of_error(self, text: str) -> str:
        """Return a text without key, URL and host."""
        for secret in (self._key, self._url):
            if secret:
                text = text.replace(secret, "***")
        return re.sub(rf"(?<![\w.-]){re.escape(self._host)}(?![\w.-])", "***", text)

    def out_of_answer(self, text: str) -> str:
        """Return a text without the key."""
        return text.replace(self._key, "***") if len(self._key) >= _SECRET_LENGTH else text


@contextlib.contextmanager
def url_kept_from_logs() -> Iterator[None]:
    """Keep httpx2 from logging the URL of a request, which it does for every one."""
    logger = logging.getLogger("httpx2")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False
