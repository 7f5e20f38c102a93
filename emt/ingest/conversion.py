"""PDF, HTML and Word files to text, with the packages of the extra `documents`.

HTML and Word become Markdown, so that headings, lists and tables keep their form. The lines of a
PDF are joined to paragraphs: a line's end would otherwise end a sentence.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path

from emt.errors import CorpusError

# What may end the last line of a paragraph.
_TERMINAL = tuple(".!?:;\u2026\u3002\uff01\uff1f\u0964\u061f")
_FULL_LINE = 0.6  # of the longest line of a page: a shorter one is a heading, or ends a paragraph
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_NO_TEXT = ("script", "style", "noscript", "template", "head")  # elements of HTML


def convert(path: Path, data: bytes) -> str:
    """Return the text of a PDF, HTML or Word file.

    Raises:
        CorpusError: a package for it is missing, or the file is damaged, locked or without text.
    """
    missing = missing_packages(path)
    if missing:
        raise CorpusError(
            f"'{path}' needs {' and '.join(missing)} to be read. Install them with "
            "`pip install 'emt[documents]'`, or convert the file to text."
        )
    try:
        text = _CONVERTERS[path.suffix.lower()](data)
    except Exception as error:  # each package has errors of its own, and files may be anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise CorpusError(
            f"'{path}' cannot be converted to text: {reason}. Convert it yourself, or leave it out."
        ) from error
    text = _CONTROL.sub("", text).encode("utf-8", "replace").decode()  # half of a surrogate pair
    if not text.strip():
        raise CorpusError(
            f"'{path}' has no text; a scanned document needs character recognition first. "
            "Convert it yourself, or leave it out."
        )
    return text


def missing_packages(path: Path) -> list[str]:
    """Return the packages that are needed to read a file, and that are not installed."""
    names = _PACKAGES.get(path.suffix.lower(), ())
    return [name for name in names if importlib.util.find_spec(name) is None]


def _text_of_html(data: bytes | str) -> str:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(data, "lxml")  # knows the encoding from the file
    for element in soup(list(_NO_TEXT)):
        element.decompose()
    converter = MarkdownConverter(
        heading_style="ATX",
        strip=["a", "img"],  # their text stays, their addresses go
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )
    text = str(converter.convert_soup(soup))
    return re.sub(r"[ \t]+$", "", re.sub(r"\n\s*\n", "\n\n", text), flags=re.M).strip()


def _text_of_word(data: bytes) -> str:
    import mammoth

    return _text_of_html(str(mammoth.convert_to_html(io.BytesIO(data)).value))


def _text_of_pdf(data: bytes) -> str:
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    try:
        pages = [page.get_textpage().get_text_bounded() for page in document]
    finally:
        document.close()
    return "\n\n".join(filter(None, map(_paragraphs, pages)))


def _paragraphs(page: str) -> str:
    """Join the lines of a page to paragraphs, and words that are cut at a line's end."""
    page = re.sub(r"[\x02\xad\ufffe](\r?\n)?", "", page)  # how PDFium marks such a cut
    lines = [" ".join(line.split()) for line in page.splitlines()]
    longest = max(map(len, lines), default=0)
    text = ""
    for line in lines:
        text += line
        is_full = len(line) >= _FULL_LINE * longest and not line.endswith(_TERMINAL)
        text += " " if is_full else "\n"
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


_CONVERTERS: dict[str, Callable[[bytes], str]] = {
    ".pdf": _text_of_pdf,
    ".html": _text_of_html,
    ".htm": _text_of_html,
    ".docx": _text_of_word,
}
_PACKAGES = {
    ".pdf": ("pypdfium2",),
    ".html": ("bs4", "lxml", "markdownify"),
    ".htm": ("bs4", "lxml", "markdownify"),
    ".docx": ("mammoth", "bs4", "lxml", "markdownify"),
}
CONVERTED = tuple(_CONVERTERS)
