"""Answers: asked, streamed, stopped, refused, and what their words drew on."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect

from tests.emt.serving.page.fake_server import FakeServer
from tests.emt.serving.page.steps import TIDES, ask, is_seen, read, texts


def test_an_answer_shows_its_passage_in_the_document(tab: Any, fake: FakeServer) -> None:
    answer = ask(tab, "tides?")
    assert answer.locator(".text").text_content() == "It is twelve ok"
    assert texts(answer.locator(".word")) == ["twelve", "ok"]
    expect(answer.locator(".footer")).to_have_text("Drawn from 1 passage · 3 tokens")
    card = tab.locator(".card")
    assert [(each.get_attribute("aria-label"), each.get_attribute("aria-valuetext"))
            for each in card.get_by_role("meter").all()] == [
        ("score", "80 %"), ("share", "60 %"), ("copied", "70 %"), ("share", "50 %")]  # fmt: skip
    assert texts(card.locator("q")) == ["every twelve hours"]
    expect(tab.locator("#reader-title")).to_have_text("tides.txt")
    assert read(tab) == TIDES
    assert texts(tab.locator("#reader-text mark")) == ["water comes ", "every twelve hours"]
    assert fake.asked[0]["memory"] == {"enabled": True, "tokens": True}
    assert fake.asked[0]["messages"] == [{"role": "user", "content": "tides?"}]


def test_a_word_tells_on_hover_what_it_drew_on(tab: Any) -> None:
    answer = ask(tab, "tides?")
    tab.mouse.move(0, 0)
    expect(tab.locator("#tip")).to_be_hidden()
    answer.locator(".word").first.hover()
    expect(tab.get_by_role("tooltip")).to_contain_text("1 tides.txt")
    assert texts(tab.locator("#tip q")) == ["water comes every twelve hours"]
    assert texts(tab.locator("#tip q mark")) == ["every twelve hours"]
    assert tab.locator("#tip .meter").get_attribute("aria-valuenow") == "0.9"
    expect(tab.locator("#reader-text .pointed")).to_have_text(["every twelve hours"])
    expect(tab.locator(".card")).to_have_class("card pointed")
    strong, weak = (each.evaluate("e => getComputedStyle(e).getPropertyValue('--share')")
                    for each in answer.locator(".word").all())  # fmt: skip
    assert strong == "100%"
    assert float(weak.removesuffix("%")) == pytest.approx(100 / 3)
    tab.keyboard.press("Escape")
    expect(tab.locator("#tip")).to_be_hidden()


def test_all_of_it_is_done_with_the_keyboard(tab: Any, fake: FakeServer) -> None:
    expect(tab.locator("#question")).to_be_focused()
    tab.keyboard.type("tides?")
    tab.keyboard.press("Enter")
    expect(tab.locator(".footer")).to_be_visible()
    tab.locator("#conversation").focus()
    tab.keyboard.press("Tab")
    first, second = tab.locator(".word").all()
    expect(first).to_be_focused()
    expect(tab.get_by_role("tooltip")).to_be_visible()
    assert first.get_attribute("aria-describedby") == "tip"
    tab.keyboard.press("ArrowRight")
    expect(second).to_be_focused()
    tab.keyboard.press("Home")
    expect(first).to_be_focused()
    tab.keyboard.press("Tab")  # all words are one stop
    expect(tab.locator(".footer button")).to_be_focused()
    expect(tab.get_by_role("tooltip")).to_be_hidden()
    tab.get_by_role("link", name="Documents").focus()
    tab.keyboard.press("Enter")
    tab.get_by_role("button", name="Remove tides.txt").focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Keep it")).to_be_focused()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Read tides.txt")).to_have_count(0)
    assert "tides.txt" not in fake.documents


def test_nothing_relevant_is_said(tab: Any) -> None:
    answer = ask(tab, "nothing?")
    expect(answer.locator(".footer")).to_contain_text("Nothing relevant in the memory")
    expect(tab.locator("#no-passages")).to_have_text("Nothing relevant in the memory.")
    tab.get_by_text("Options").click()
    tab.get_by_label("Use the memory").uncheck()
    expect(ask(tab, "nothing?").locator(".footer")).to_contain_text("without the memory")


def test_sentences_stand_where_no_passage_was_recalled_as_a_whole(
    tab: Any, fake: FakeServer
) -> None:
    """As in token mode, in which rows are retrieved one by one."""
    fake.answers["tides?"]["passages"] = []
    answer = ask(tab, "tides?")
    expect(answer.locator(".footer")).to_contain_text("Drawn from 1 passage")
    expect(tab.locator(".card .excerpt")).to_have_text("every twelve hours")
    expect(tab.locator("#reader-text mark")).to_have_text(["every twelve hours"])


def test_an_earlier_answer_keeps_its_words_and_the_model_is_told_both(
    tab: Any, fake: FakeServer
) -> None:
    ask(tab, "tides?")
    ask(tab, "nothing?")
    assert [message["content"] for message in fake.asked[1]["messages"]] == [
        "tides?", "It is twelve ok", "nothing?"]  # fmt: skip
    expect(tab.locator(".card")).to_have_count(0)
    tab.locator(".word").first.hover()
    expect(tab.locator(".card.pointed")).to_have_count(1)
    tab.get_by_role("button", name="New chat").click()
    ask(tab, "nothing?")
    assert len(fake.asked[2]["messages"]) == 1
    tab.reload()
    expect(tab.locator("#welcome")).to_be_visible()
    expect(tab.locator(".answer")).to_have_count(0)


def test_a_stopped_answer_keeps_what_was_said(tab: Any, fake: FakeServer) -> None:
    fake.gate.clear()
    tab.get_by_role("textbox", name="Question").fill("tides?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    expect(tab.locator(".answer .text")).to_have_text("It is")
    assert tab.locator(".answer").get_attribute("aria-busy") == "true"
    tab.get_by_role("button", name="Stop").click()
    expect(tab.locator(".answer")).to_have_text("It isStopped.")
    expect(tab.locator("#progress")).to_have_text("Stopped.")
    for _ in range(200):
        if fake.num_stopped:
            break
        tab.wait_for_timeout(20)
    assert fake.num_stopped == 1  # the server has noticed
    fake.gate.set()
    ask(tab, "nothing?")
    assert fake.asked[1]["messages"][1] == {"role": "assistant", "content": "It is"}


def test_refusals_are_told_in_the_servers_words(tab: Any, fake: FakeServer) -> None:
    assert "it broke" in ask(tab, "broken?").text_content()
    fake.refusal = (503, "The server is busy.")
    expect(ask(tab, "tides?")).to_have_text("The server is busy. Try again in 2 s.")
    expect(tab.locator("#question")).to_have_value("tides?")  # to be sent again
    fake.refusal = None
    tab.get_by_role("button", name="Ask", exact=True).click()
    expect(tab.locator(".answer").last.locator(".text")).to_have_text("It is twelve ok")


def test_a_question_may_be_of_some_documents_only(tab: Any, fake: FakeServer) -> None:
    tab.get_by_role("link", name="Documents").click()
    tab.get_by_role("button", name="Ask only tides.txt").click()
    tab.get_by_text("Options").click()
    for pair in ("year=1999", "year=2000", "__proto__=x"):
        tab.get_by_label("Only documents with").fill(pair)
        tab.get_by_label("Only documents with").press("Enter")
    ask(tab, "tides?")
    assert fake.asked[0]["memory"] == {
        "enabled": True,
        "tokens": True,
        "documents": ["tides.txt"],
        "where": {"year": ["1999", 1999, "2000", 2000], "__proto__": ["x"]},
    }


def test_on_a_phone_the_passages_come_in_front(tab: Any) -> None:
    tab.set_viewport_size({"width": 360, "height": 640})
    answer = ask(tab, "tides?")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    expect(tab.locator("#sources")).to_be_hidden()
    answer.locator(".footer button").click()
    assert is_seen(tab, "#reader-text .quote")
    tab.get_by_role("button", name="Close").click()
    expect(tab.locator("#sources")).to_be_hidden()
