"""What a user does in the page and sees there, and answers that are told to the letter."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import expect

from tests.emt.serving.page.fake_server import FakeServer

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
TIDES = "The moon pulls the sea. 🌊 High water comes every twelve hours.\nNothing else is said."
LENGTH = 1_000_000


def long_text() -> str:
    """Return lines that tell where they stand, a million characters of them."""
    return "".join(f"line {i:08d} \n" for i in range(LENGTH // 15 + 1))[:LENGTH]


def drawn(fake: FakeServer, name: str, quote: str, word: str) -> dict[str, Any]:
    """Return an answer, "It is WORD ok", whose word was drawn from the quote in a document."""
    source = fake.passage(name, quote)
    text = fake.documents[name].text
    passage = {**source, "start": max(source["start"] - 12, 0), "score": 0.8, "share": 0.6}
    passage["text"] = text[passage["start"] : passage["end"]]
    citation = {**source, "quote": quote, "score": None, "share": 0.5, "copied": 0.7}
    tokens = [
        {"text": "It is", "sources": []},
        {"text": f" {word}", "sources": [{**source, "share": 0.9}]},
        {"text": " ok", "sources": [{**source, "share": 0.3}]},
    ]
    return {"tokens": tokens, "passages": [passage], "citations": [citation]}


def ask(tab: Any, question: str) -> Any:
    """Ask, and return the newest answer when it has come."""
    tab.get_by_role("textbox", name="Question").fill(question)
    tab.get_by_role("button", name="Ask", exact=True).click()
    expect(tab.locator("#stop")).to_be_hidden()
    return tab.locator(".answer").last


def is_seen(tab: Any, selector: str) -> bool:
    """Tell whether the first such element of the reader lies in what the reader shows."""
    frame, box = tab.locator("#reader-text").bounding_box(), tab.locator(selector).first
    box = box.bounding_box()
    return frame["y"] <= box["y"] and box["y"] + box["height"] <= frame["y"] + frame["height"]


def texts(locator: Any) -> list[str]:
    return locator.all_text_contents()


def read(tab: Any) -> str:
    """Return what the reader shows, when it has come."""
    expect(tab.locator("#reader-text:not([aria-busy]) [data-piece]").first).to_be_visible()
    return tab.locator("#reader-text").text_content()
