"""PDF, HTML and Word files to text, and what is said without the packages for them."""

import importlib.util
import io
import zipfile

import pytest

from emt.errors import CorpusError
from emt.ingest import conversion
from emt.ingest.corpus import Corpus

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("bs4", "lxml", "mammoth", "pypdfium2")),
    reason="needs the packages of the extra `documents`",
)
HTML = (
    "<html><head><title>Not this</title><style>p {}</style></head><body><h1>Caf\u00e9 prices</h1>"
    "<p>Tea_1 costs <b>two</b> * 3.<p>See <a href='http://example.com'>the list</a>."
    "<ul><li>milk<li>sugar</ul><table><tr><th>cup</th><th>price</th></tr><tr><td>small</td>"
    "<td>2</td></tr></table><script>alert(1)</script></body></html>"
)
MARKDOWN = (
    "# Caf\u00e9 prices\n\nTea_1 costs **two** * 3.\n\nSee the list.\n\n* milk\n* sugar\n\n"
    "| cup | price |\n| --- | --- |\n| small | 2 |"
)


def pdf(*lines):
    """Return a PDF of one page with these lines."""
    shown = " ".join(f"({line}) Tj T*" for line in lines)
    content = f"BT /F1 12 Tf 14 TL 72 720 Td {shown} ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        offsets.append(f"{len(data):010d} 00000 n \n")
        data += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = f"xref\n0 6\n0000000000 65535 f \n{''.join(offsets)}"
    trailer = f"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF"
    return data + (table + trailer).encode()


def word(*paragraphs):
    """Return a .docx file of these paragraphs, the first of them a heading."""
    package = "http://schemas.openxmlformats.org/package/2006"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    main = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    style = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'
    body = "".join(
        f"<w:p>{'' if number else style}<w:r><w:t>{text}</w:t></w:r></w:p>"
        for number, text in enumerate(paragraphs)
    )
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default '
        'Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-'
        'officedocument.wordprocessingml.document.main+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{main}"><w:body>{body}</w:body></w:document>',
        "word/styles.xml": f'<w:styles xmlns:w="{main}"/>',
    }
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, text in parts.items():
            file.writestr(name, text)
    return data.getvalue()


def text_of(folder, name, data):
    (folder / name).write_bytes(data)
    (document,) = Corpus([folder / name])
    assert document.name == name
    return document.text


@needs_packages
def test_html_becomes_markdown_without_what_is_no_text(tmp_path):
    assert text_of(tmp_path, "a.html", HTML.encode()) == MARKDOWN
    latin = HTML.replace("<head>", '<head><meta charset="iso-8859-1">').encode("latin-1")
    assert text_of(tmp_path, "b.HTM", latin) == MARKDOWN


@needs_packages
def test_word_paragraphs_are_paragraphs(tmp_path):
    data = word("Prices", "Tea &lt;hot&gt; costs two.", "Milk is free.")
    assert text_of(tmp_path, "a.docx", data) == "# Prices\n\nTea <hot> costs two.\n\nMilk is free."


@needs_packages
def test_lines_of_a_pdf_are_joined_to_paragraphs(tmp_path):
    data = pdf(
        "Prices",
        "The tea costs two, and the price of the milk was doub-",
        "led in the first week of the year; the sugar, which is",
        "brown, is free.",
        "Cups come in three sizes, and each of them is blue.",
        "small",
        "large",
    )
    assert text_of(tmp_path, "a.pdf", data) == (
        "Prices\nThe tea costs two, and the price of the milk was doubled in the first week of the "
        "year; the sugar, which is brown, is free.\nCups come in three sizes, and each of them is "
        "blue.\nsmall\nlarge"
    )


@needs_packages
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdf", b"%PDF-1.4 and no more", "cannot be converted to text: .*Data format error"),
        ("a.pdf", pdf(), "has no text; a scanned document needs character recognition first"),
        ("a.docx", b"no zip", "cannot be converted to text: File is not a zip file"),
        ("a.docx", word(), "has no text"),
        ("a.html", b"<script>1</script>", "has no text"),
        ("a.pdf", b"", "is empty. Leave it out"),
    ],
)
def test_files_that_cannot_be_converted_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=f"'{tmp_path / name}' {message}"):
        Corpus([tmp_path])


@needs_packages
def test_control_characters_do_not_become_text(tmp_path):
    assert text_of(tmp_path, "a.html", b"<p>a\x0cb\x01c&#0;</p>").isprintable()


def test_without_the_packages_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "missing_packages", lambda path: ["pypdfium2"])
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf("text"))
    with pytest.raises(CorpusError, match=r"'.*a.pdf' needs pypdfium2 .* 'emt\[documents\]'"):
        Corpus([path])


def test_without_the_packages_files_in_folders_are_counted(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pypdfium2" else find_spec(name)
    )
    (tmp_path / "a.pdf").write_bytes(pdf("text"))
    with pytest.raises(CorpusError, match=r"only files are .pdf files.*'emt\[documents\]'"):
        Corpus([tmp_path])
    (tmp_path / "b.txt").write_text("text")
    corpus = Corpus([tmp_path])
    assert (corpus.names, corpus.not_installed) == (["b.txt"], {".pdf": 1})
