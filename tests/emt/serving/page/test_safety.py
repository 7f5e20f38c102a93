"""Nothing in a document, a name or an answer is ever markup, and markup would not run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from playwright.sync_api import expect
from starlette.testclient import TestClient

import emt.serving.page
from tests.emt.serving.page.fake_server import FakeServer, make_app
from tests.emt.serving.page.steps import SCRIPT, ask, read

PAGE = Path(emt.serving.page.__file__).with_suffix("")


def test_a_hostile_document_is_text_wherever_it_is_shown(tab: Any) -> None:
    answer = ask(tab, "hostile?")
    assert answer.locator(".text").text_content() == f"It is {SCRIPT} ok"
    answer.locator(".word").first.hover()
    expect(tab.locator("#tip")).to_contain_text(SCRIPT)
    assert SCRIPT in tab.locator(".card").text_content()
    assert tab.locator("#reader-title").text_content() == SCRIPT
    assert read(tab) == f"{SCRIPT} says the document."
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


def test_markup_that_slipped_in_would_not_run(
    tab: Any, complaints: list[str]
) -> None:  # fmt: skip
    """The policy of the empty_tab, beside that nothing is ever made markup."""
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


def test_every_answer_has_the_headers() -> None:
    client = TestClient(make_app(FakeServer()))
    answers = [client.get(path) for path in ("/", "/page/page.js", "/v1/store", "/v1/nothing")]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404]
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"].split("; ")
        assert policy[0] == "default-src 'self'"
        assert not [rule for rule in policy if "unsafe" in rule or "*" in rule]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_the_files_of_the_page_and_no_others_are_served() -> None:
    client = TestClient(make_app(FakeServer()))
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in PAGE.iterdir():
        answer = client.get(f"/page/{path.name}")
        assert answer.content == path.read_bytes()
        kind = answer.headers["Content-Type"].partition(";")[0]
        assert kind == kinds.get(path.suffix, "text/html")
    assert client.head("/").status_code == 200
    assert client.post("/").status_code == 405
    for path in ("/page/", "/page/../page.py", "/page/%2e%2e%2fpage.py", "/page/..%5cpage.py"):
        assert client.get(path).status_code == 404


def test_the_page_makes_no_markup_and_asks_nobody_else() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        wrong = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|//\w+\.|style=| on\w+="
        assert re.findall(wrong, text) == [], path.name
    index = (PAGE / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>", index) == ['<script type="module" src="page/page.js">']
    assert "<style" not in index
