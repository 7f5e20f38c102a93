"""The page with the real server: the shapes that it is made for are those that it gets."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import expect

from emt.serving.app import create_app
from tests.emt.serving.page.steps import ask, read
from tests.emt.serving.tiny_server import TEXTS, make_memory, serving


def test_the_page_works_with_the_real_server(empty_tab: Any) -> None:
    """What a tiny model says has no sense, but its tokens, passages and documents are real."""
    with serving(create_app(*make_memory(), model_name="tiny")) as address:
        empty_tab.goto(address)
        empty_tab.get_by_text("Options").click()
        empty_tab.get_by_label("Longest answer").fill("8")
        answer = ask(empty_tab, "w30 w31 w32")
        expect(answer.locator(".footer")).to_have_text("Drawn from 1 passage · 8 tokens")
        expect(empty_tab.locator("#reader-title")).to_have_text("b")
        assert read(empty_tab) == TEXTS["b"]
        answer.locator(".word").first.hover()
        expect(empty_tab.locator(".card.pointed")).to_have_count(1)
        expect(empty_tab.locator("#reader-text .pointed").first).to_be_visible()
        empty_tab.get_by_role("link", name="Documents").click()
        empty_tab.locator("#files").set_input_files(
            {"name": "new.txt", "mimeType": "text/plain", "buffer": TEXTS["a"].encode()}
        )
        expect(empty_tab.locator("#uploads [role=status]")).to_have_text("added")
        expect(empty_tab.locator("#summary")).to_have_text("4 documents, 84 tokens")
        empty_tab.get_by_role("button", name="Show only user=c").click()
        expect(empty_tab.locator("#list li")).to_have_count(1)
        empty_tab.get_by_role("button", name="Remove c").click()
        empty_tab.get_by_role("button", name="Remove", exact=True).click()
        expect(empty_tab.locator("#summary")).to_have_text("3 documents, 63 tokens")
