"""The page, in a real browser: asked, hovered, read, written, and fed with hostile documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")
expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

from emt.serving.app import create_app  # noqa: E402
from tests.emt.serving.browser import chromium, complaints, page  # noqa: E402, F401
from tests.emt.serving.fake_server import Document, FakeServer, make_app  # noqa: E402
from tests.emt.serving.tiny_server import TEXTS, make_memory, serving  # noqa: E402

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


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    with serving(make_app(fake)) as address:
        yield fake, address


@pytest.fixture
def fake(served: tuple[FakeServer, str]) -> FakeServer:
    """The server as every test finds it: three documents and some answers."""
    fake = served[0]
    fake.__init__()  # type: ignore[misc]
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
def tab(served: tuple[FakeServer, str], fake: FakeServer, page: Any) -> Any:  # noqa: F811
    page.goto(served[1])
    return page


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
    assert tab.locator("#reader-text").text_content() == TIDES
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
    assert texts(tab.locator("#reader-text .pointed")) == ["every twelve hours"]
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


def test_a_hostile_document_is_text_wherever_it_is_shown(tab: Any) -> None:
    answer = ask(tab, "hostile?")
    assert answer.locator(".text").text_content() == f"It is {SCRIPT} ok"
    answer.locator(".word").first.hover()
    expect(tab.locator("#tip")).to_contain_text(SCRIPT)
    assert SCRIPT in tab.locator(".card").text_content()
    assert tab.locator("#reader-title").text_content() == SCRIPT
    assert tab.locator("#reader-text").text_content() == f"{SCRIPT} says the document."
    tab.get_by_role("link", name="Documents").click()
    tab.get_by_role("button", name=f"Read {SCRIPT}").click()
    tab.get_by_role("button", name=f"Ask only {SCRIPT}").click()
    assert SCRIPT in tab.locator("#chosen").text_content()
    tab.get_by_role("link", name="Documents").click()
    tab.get_by_role("button", name=f"Show only {SCRIPT}={SCRIPT}").click()
    expect(tab.locator("#list li")).to_have_count(1)
    tab.get_by_role("button", name=f"Remove {SCRIPT}").click()
    assert tab.locator("#remove-name").text_content() == SCRIPT
    assert tab.locator("script").count() == 1
    assert tab.locator("img").count() == 1  # the icon


def test_a_million_characters_are_read_in_pieces(tab: Any, fake: FakeServer) -> None:
    ask(tab, "long?")
    expect(tab.locator("#reader-text .quote")).to_have_text("line 00040000")
    assert is_seen(tab, "#reader-text .quote")
    text = tab.locator("#reader-text")
    for _ in range(12):
        text.evaluate("e => e.scrollTop = e.scrollHeight")
        tab.wait_for_timeout(30)
    shown = text.text_content()
    assert int(re.findall(r"line (\d{8})", shown)[0]) > 40_000  # what was above is far away by now
    assert shown in fake.documents["long.txt"].text
    tab.get_by_label("Go to").fill("0")
    expect(text).to_contain_text("line 00000000")
    tab.get_by_label("Go to").fill("249")
    expect(text).to_contain_text(fake.documents["long.txt"].text[-30:])
    lengths = [end - start for _, start, end in fake.ranges]
    assert max(lengths) <= 12_000
    assert len(text.text_content()) <= 24_000


def test_what_is_read_stays_in_place_when_pieces_come_and_go(tab: Any) -> None:
    ask(tab, "long?")
    text = tab.locator("#reader-text")
    expect(text.locator(".quote")).to_be_visible()
    for _ in range(3):  # up, where pieces are added before what is read
        text.evaluate("e => e.scrollTop = 40")
        before = _top_line(text)
        tab.wait_for_timeout(300)
        assert abs(_top_line(text) - before) <= 2


def _top_line(text: Any) -> int:
    """Return the number of the line at the top of the reader."""
    return int(
        text.evaluate("""e => {
      const box = e.getBoundingClientRect();
      const range = document.caretRangeFromPoint(box.left + 40, box.top + 12);
      const node = range.startContainer;
      return node.data.slice(0, range.startOffset + 30).match(/line (\\d{8})/g).at(-1).slice(5);
    }""")
    )


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


def test_a_key_is_asked_for_kept_for_the_tab_and_sent(
    served: tuple[FakeServer, str], fake: FakeServer, page: Any  # noqa: F811
) -> None:  # fmt: skip
    fake.key = "secret"
    page.goto(served[1] + "/#documents")
    field = page.get_by_role("textbox", name="Key")
    field.fill("wrong")
    field.press("Enter")
    expect(page.locator("#key-reason")).to_have_text("The server does not know this key.")
    field.fill("secret")
    field.press("Enter")
    expect(page.locator("#list li")).to_have_count(3)
    page.locator("#files").set_input_files(
        {"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"}
    )
    expect(page.locator("#list li")).to_have_count(4)
    page.reload()
    expect(page.locator("#list li")).to_have_count(4)
    expect(page.locator("#key-dialog")).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [
        0, "", served[1] + "/#documents"]  # fmt: skip


def test_on_a_phone_the_passages_come_in_front(tab: Any) -> None:
    tab.set_viewport_size({"width": 360, "height": 640})
    answer = ask(tab, "tides?")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    expect(tab.locator("#sources")).to_be_hidden()
    answer.locator(".footer button").click()
    assert is_seen(tab, "#reader-text .quote")
    tab.get_by_role("button", name="Close").click()
    expect(tab.locator("#sources")).to_be_hidden()


def test_markup_that_slipped_in_would_not_run(
    tab: Any, complaints: list[str]  # noqa: F811
) -> None:  # fmt: skip
    """The policy of the page, beside that nothing is ever made markup."""
    violated = tab.evaluate("""() => new Promise(resolve => {
      document.addEventListener("securitypolicyviolation", e => resolve(e.violatedDirective));
      document.body.append(document.createRange().createContextualFragment(
        "<img src='data:,' onerror='window.ran = 1'><script>window.ran = 1</script>"));
    })""")
    assert violated
    assert tab.evaluate("window.ran") is None
    assert complaints
    assert all("Content Security Policy" in complaint for complaint in complaints)
    complaints.clear()


def test_the_page_works_with_the_real_server(page: Any) -> None:  # noqa: F811
    """What a tiny model says has no sense, but its tokens, passages and documents are real."""
    with serving(create_app(*make_memory(), model_name="tiny")) as address:
        page.goto(address)
        page.get_by_text("Options").click()
        page.get_by_label("Longest answer").fill("8")
        answer = ask(page, "w30 w31 w32")
        expect(answer.locator(".footer")).to_have_text("Drawn from 1 passage · 8 tokens")
        expect(page.locator("#reader-title")).to_have_text("b")
        assert page.locator("#reader-text").text_content() == TEXTS["b"]
        answer.locator(".word").first.hover()
        expect(page.locator(".card.pointed")).to_have_count(1)
        assert texts(page.locator("#reader-text .pointed"))
        page.get_by_role("link", name="Documents").click()
        page.locator("#files").set_input_files(
            {"name": "new.txt", "mimeType": "text/plain", "buffer": TEXTS["a"].encode()}
        )
        expect(page.locator("#uploads [role=status]")).to_have_text("added")
        expect(page.locator("#summary")).to_have_text("4 documents, 84 tokens")
        page.get_by_role("button", name="Show only user=c").click()
        expect(page.locator("#list li")).to_have_count(1)
        page.get_by_role("button", name="Remove c").click()
        page.get_by_role("button", name="Remove", exact=True).click()
        expect(page.locator("#summary")).to_have_text("3 documents, 63 tokens")
