"""Long documents: read in pieces, of which a few are in the page."""

from __future__ import annotations

import re
from typing import Any

from playwright.sync_api import expect

from tests.emt.serving.page.fake_server import FakeServer
from tests.emt.serving.page.steps import ask, is_seen


def test_a_million_characters_are_read_in_pieces(tab: Any, fake: FakeServer) -> None:
    answer = ask(tab, "long?")
    expect(tab.locator("#reader-text .quote")).to_have_text("line 00040000")
    assert is_seen(tab, "#reader-text .quote")
    answer.locator(".word").first.hover()
    expect(tab.locator("#reader-text .pointed")).to_have_text("line 00040000")
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
