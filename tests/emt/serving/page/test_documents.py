"""Documents: added, listed, removed, and kept behind a key."""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import expect

from tests.emt.serving.page.fake_server import Document, FakeServer
from tests.emt.serving.page.steps import SCRIPT


def test_files_are_added_and_the_list_knows_them(tab: Any, fake: FakeServer) -> None:
    tab.get_by_role("link", name="Documents").click()
    expect(tab.locator("#summary")).to_have_text(re.compile("^3 documents, "))
    tab.get_by_text("Metadata of what is added").click()
    tab.get_by_label("Metadata", exact=True).fill("year=2001")
    tab.get_by_label("Metadata", exact=True).press("Enter")
    tab.locator("#files").set_input_files([
        {"name": "a&b ü/.txt", "mimeType": "text/plain", "buffer": "sea 🌊".encode()},
        {"name": "tides.txt", "mimeType": "text/plain", "buffer": b"new"},
        {"name": "bad.txt", "mimeType": "text/plain", "buffer": b"\xff\xfe"},
    ])  # fmt: skip
    expect(tab.locator("#uploads [role=status]")).to_have_text(
        ["added", "replaced", "'bad.txt' is not UTF-8."])  # fmt: skip
    (name,) = set(fake.documents) - {"tides.txt", SCRIPT, "long.txt"}
    assert name.startswith("a&b ü")
    assert fake.documents[name] == Document("sea 🌊", {"year": 2001})
    assert fake.documents["tides.txt"].text == "new"
    tab.get_by_role("button", name=f"Read {name}").click()
    expect(tab.locator("#reader-text")).to_have_text("sea 🌊")


def test_files_are_dropped(tab: Any, fake: FakeServer) -> None:
    tab.get_by_role("link", name="Documents").click()
    for target in ("#drop", "body"):  # beside the place for it, nothing happens
        transfer = tab.evaluate_handle(
            """name => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(["dropped"], name, { type: "text/plain" }));
          return transfer;
        }""",
            f"{target}.txt",
        )
        tab.dispatch_event(target, "drop", {"dataTransfer": transfer})
    expect(tab.locator("#uploads [role=status]")).to_have_text(["added"])
    assert fake.documents["#drop.txt"].text == "dropped"
    assert "body.txt" not in fake.documents


def test_the_list_is_searched_filtered_and_paged(tab: Any, fake: FakeServer) -> None:
    fake.documents |= {f"note {i:03d}": Document("x", {"part": i % 2}) for i in range(120)}
    tab.get_by_role("link", name="Documents").click()
    tab.reload()
    rows = tab.locator("#list li")
    expect(rows).to_have_count(50)
    for count in (100, 123):
        tab.get_by_role("button", name="Show more").click()
        expect(rows).to_have_count(count)
    expect(tab.get_by_role("button", name="Show more")).to_be_hidden()
    tab.get_by_label("Search names").fill("note 11")
    expect(rows).to_have_count(10)
    tab.get_by_label("Only with", exact=True).fill("part=1")
    tab.get_by_label("Only with", exact=True).press("Enter")
    expect(rows).to_have_count(5)
    tab.get_by_role("button", name="Take away part=1").click()
    expect(rows).to_have_count(10)
    tab.get_by_label("Search names").fill("nowhere")
    expect(tab.locator("#list-status")).to_have_text("No document is like this.")
    tab.get_by_text("Figures of the store").click()
    expect(tab.locator("#figures")).to_contain_text("bytes rows2.5 MB")


def test_a_removal_asks_first(tab: Any, fake: FakeServer) -> None:
    tab.get_by_role("link", name="Documents").click()
    tab.get_by_role("button", name="Read tides.txt").click()
    expect(tab.locator("#reader")).to_be_visible()
    for button, is_there in (("Keep it", True), ("Remove", False)):
        tab.get_by_role("button", name="Remove tides.txt").click()
        tab.locator("#remove-dialog").get_by_role("button", name=button, exact=True).click()
        expect(tab.get_by_role("button", name="Read tides.txt")).to_have_count(int(is_there))
        assert ("tides.txt" in fake.documents) == is_there
    expect(tab.locator("#reader")).to_be_hidden()


def test_a_key_is_asked_for_kept_for_the_tab_and_sent(
    served: tuple[FakeServer, str], fake: FakeServer, empty_tab: Any
) -> None:  # fmt: skip
    fake.key = "secret"
    empty_tab.goto(served[1] + "/#documents")
    field = empty_tab.get_by_role("textbox", name="Key")
    field.fill("wrong")
    field.press("Enter")
    expect(empty_tab.locator("#key-reason")).to_have_text("The server does not know this key.")
    field.fill("secret")
    field.press("Enter")
    expect(empty_tab.locator("#list li")).to_have_count(3)
    empty_tab.locator("#files").set_input_files(
        {"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"}
    )
    expect(empty_tab.locator("#list li")).to_have_count(4)
    empty_tab.reload()
    expect(empty_tab.locator("#list li")).to_have_count(4)
    expect(empty_tab.locator("#key-dialog")).to_be_hidden()
    assert empty_tab.evaluate("[localStorage.length, document.cookie, location.href]") == [
        0, "", served[1] + "/#documents"]  # fmt: skip


def test_who_may_only_read_is_offered_nothing_else(tab: Any, fake: FakeServer) -> None:
    tab.get_by_role("link", name="Documents").click()
    expect(tab.get_by_role("button", name="Remove tides.txt")).to_be_visible()
    expect(tab.locator("#drop")).to_be_visible()
    fake.can_write = False
    tab.reload()
    expect(tab.get_by_role("button", name="Ask only tides.txt")).to_be_visible()
    expect(tab.get_by_role("button", name="Remove tides.txt")).to_be_hidden()
    expect(tab.locator("#drop")).to_be_hidden()
