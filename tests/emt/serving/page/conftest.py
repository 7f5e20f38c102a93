"""A headless Chromium for the tests of the page, where there is one, and a server for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from tests.emt.serving.page.fake_server import Document, FakeServer, make_app
from tests.emt.serving.page.steps import SCRIPT, TIDES, drawn, long_text
from tests.emt.serving.tiny_server import serving

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # while it runs, so does an event loop, in the way of other tests
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium: `apt-get install chromium`, or another package that has it")
    with sync_playwright() as running:
        # a sandbox of its own needs rights that root in a container lacks
        browser = running.chromium.launch(executable_path=path, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the tab's console and its dialogs say; a test that expects some clears it."""
    return []


@pytest.fixture
def empty_tab(chromium: Any, complaints: list[str]) -> Iterator[Any]:
    """An empty tab. After the test: no complaints, but of requests that were refused."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(10_000)
    tab = context.new_page()
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    yield tab
    context.close()
    assert [each for each in complaints if "Failed to load resource" not in each] == []


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    with serving(make_app(fake)) as address:
        yield fake, address


@pytest.fixture
def fake(served: tuple[FakeServer, str]) -> FakeServer:
    """The server as every test finds it: three documents and some answers."""
    fake = served[0]
    vars(fake).update(vars(FakeServer()))
    fake.gate.set()
    fake.documents = {
        "tides.txt": Document(TIDES, {"year": 1999, "kind": "book"}),
        SCRIPT: Document(f"{SCRIPT} says the document.", {SCRIPT: SCRIPT}),
        "long.txt": Document(long_text()),
    }
    fake.answers = {
        "tides?": drawn(fake, "tides.txt", "every twelve hours", "twelve"),
        "hostile?": drawn(fake, SCRIPT, "says the document", SCRIPT),
        "long?": drawn(fake, "long.txt", "line 00040000", "far"),
        "nothing?": {"tokens": [{"text": "No.", "sources": []}], "passages": [], "citations": []},
        "broken?": {"tokens": [{"text": "Half", "sources": []}], "error": "it broke"},
    }
    return fake


@pytest.fixture
def tab(served: tuple[FakeServer, str], fake: FakeServer, empty_tab: Any) -> Any:
    empty_tab.goto(served[1])
    return empty_tab
