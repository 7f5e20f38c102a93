"""Take the picture of the page in docs/images: one question, its answer, a word pointed at.

It asks a server that runs, in Chromium. With the ten documents of a demo in its store:

    emt serve --store DIR --model MODEL &
    python scripts/page_screenshot.py "Who designed the Slate Bridge?" --word Bram
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

SIZE = {"width": 1280, "height": 720}


def main() -> None:
    """Ask, point at a word, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--word", required=True, help="the token to point at, or its beginning")
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--tokens", type=int, default=48, help="of the answer, at most")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--out", type=Path, default=Path("docs/images/page.png"))
    options = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=False)
        tab = browser.new_page(viewport=SIZE, color_scheme=options.scheme)
        tab.goto(options.address)
        tab.get_by_text("Options").click()
        tab.get_by_label("Longest answer").fill(str(options.tokens))
        tab.get_by_text("Options").click()
        tab.get_by_role("textbox", name="Question").fill(options.question)
        tab.get_by_role("button", name="Ask", exact=True).click()
        expect(tab.locator(".answer .footer")).to_be_visible(timeout=300_000)
        tab.locator(".word", has_text=options.word).first.hover()
        expect(tab.get_by_role("tooltip")).to_be_visible()
        tab.wait_for_load_state("networkidle")  # the reader has the document
        options.out.parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=options.out)
        browser.close()


if __name__ == "__main__":
    main()
