"""Files and folders to documents: what is read, exactly, and what is refused, with where it is."""

import json
import os

import pytest

from emt.errors import CorpusError
from emt.ingest.corpus import Corpus


def documents(*sources):
    return [(document.name, document.text) for document in Corpus(sources)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_folders_are_searched_and_sorted_by_path(tmp_path):
    for name in ("b.txt", "a/z.md", "a/B.TXT", "c.jsonl"):
        write(tmp_path / name, '{"id": "line", "text": "of c"}' if name == "c.jsonl" else name)
    for name in ("notes.pdf", ".hidden.txt", ".git/x.md", "a/.cache/y.txt", "README"):
        write(tmp_path / name, b"\xff not text")
    (tmp_path / "folder.txt").mkdir()
    expected = [("a/B.TXT", "a/B.TXT"), ("a/z.md", "a/z.md"), ("b.txt", "b.txt"), ("line", "of c")]
    assert documents(tmp_path) == expected
    assert Corpus([tmp_path]).names == [name for name, _ in expected]


def test_sources_keep_the_order_they_are_given_in(tmp_path):
    later, earlier = write(tmp_path / "z.txt", "1"), write(tmp_path / "a" / "a.txt", "2")
    assert documents(later, str(earlier.parent)) == [("z.txt", "1"), ("a.txt", "2")]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("one\r\ntwo\r\n\r\n", "one\r\ntwo\r\n\r\n"),
        (b"\xef\xbb\xbfwith a BOM\n", "with a BOM\n"),
        (
            "  e\u0301 \U0001f469\u200d\U0001f467 \u00e9\n",
            "  e\u0301 \U0001f469\u200d\U0001f467 \u00e9\n",
        ),
        ("\u2028 is not a new line\x0b", "\u2028 is not a new line\x0b"),
    ],
    ids=["CRLF", "BOM", "emoji", "other line ends"],
)
def test_text_is_what_is_in_the_file(tmp_path, data, text):
    assert documents(write(tmp_path / "d.txt", data)) == [("d.txt", text)]


def test_jsonl_lines_are_documents(tmp_path):
    lines = [
        '{"id": "a", "text": "one\\r\\ntwo \\ud83d\\ude00", "more": [1, 2]}',
        "",
        '{"text": "  three\u2028", "id": 17}\r',
        "   ",
    ]
    path = write(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert documents(path) == [("a", "one\r\ntwo \U0001f600"), ("17", "  three\u2028")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "'{}' is empty. Leave it out."),
        (b" \r\n\t", "'{}' is empty. Leave it out."),
        (b"\xef\xbb\xbf\n", "'{}' is empty. Leave it out."),
        (b"ab\0c", "'{}' is binary; expected UTF-8 text. Convert it or leave it out."),
        ("text".encode("utf-16"), "'{}' is binary; expected UTF-8 text."),
        (b"caf\xe9", "'{}' is not UTF-8: byte 3 is 0xe9. Convert it to UTF-8 or leave it out."),
        (b"\xed\xa0\xbd", "'{}' is not UTF-8: byte 0 is 0xed."),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, data, message):
    write(tmp_path / "a.txt", "fine")
    path = write(tmp_path / "bad.txt", data)
    for source in (path, tmp_path):
        with pytest.raises(CorpusError) as caught:
            Corpus([source])
        assert str(caught.value).startswith(message.format(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", " must be an object; got list."),
        ('"text"', " must be an object; got str."),
        ("null", " must be an object; got NoneType."),
        ("{nope}", " is not JSON: Expecting property name enclosed in double quotes at column 2."),
        ("9" * 5000, " cannot be read as JSON: Exceeds the limit"),
        ("[" * 100_000, " cannot be read as JSON: maximum recursion depth exceeded"),
        ('{"id": "x"}', ' must have the keys "id" and "text"; got \'id\'.'),
        ("{}", ' must have the keys "id" and "text"; got none.'),
        ('{"id": "x", "text": 5}', ': "text" must be text, not blank; got int.'),
        ('{"id": "x", "text": " \\n"}', ': "text" must be text, not blank; got blank text.'),
        ('{"id": "x", "text": null}', ': "text" must be text, not blank; got NoneType.'),
        ('{"id": "", "text": "t"}', ': "id" must be text or a whole number, not blank; got blank'),
        (
            '{"id": true, "text": "t"}',
            ': "id" must be text or a whole number, not blank; got bool.',
        ),
        ('{"id": 1.5, "text": "t"}', ': "id" must be text or a whole number, not blank; got float'),
        (
            '{"id": ["x"], "text": "t"}',
            ': "id" must be text or a whole number, not blank; got list',
        ),
        ('{"id": "x", "text": "a \\ud83d"}', ': "text" has half of a surrogate pair'),
        ('{"id": "\\udc00", "text": "a"}', ': "id" has half of a surrogate pair'),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", '{"id": "fine", "text": "t"}\n\n' + line + "\n")
    with pytest.raises(CorpusError) as caught:
        Corpus([path])
    assert str(caught.value).startswith(f"'{path}' line 3{message}")


def test_names_are_unique_over_all_sources(tmp_path):
    one = write(tmp_path / "one" / "a.txt", "1")
    two = write(
        tmp_path / "two" / "d.jsonl", '{"id": "b", "text": "2"}\n{"id": "a.txt", "text": "3"}'
    )
    with pytest.raises(CorpusError) as caught:
        Corpus([one.parent, two])
    assert str(caught.value) == (
        f"document names must be unique; 'a.txt' is in '{one}' and in '{two}' line 2. "
        "Rename one of them, or give it once."
    )
    numbers = write(tmp_path / "n.jsonl", '{"id": "7", "text": "2"}\n{"id": 7, "text": "3"}')
    with pytest.raises(CorpusError, match=r"'7' is in '.*' line 1 and in '.*' line 2"):
        Corpus([numbers])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "'{}' does not exist. Give a file or a folder of documents."),
        ("x" * 300, "'{}' cannot be read: File name too long."),
        ("a.pdf", "expected a .txt, .md, .jsonl file or a folder of them; got '{}'."),
        ("a.pdf/b.txt", "'{}' cannot be read: Not a directory."),
        ("folder", "folder '{}' has no documents. Put .txt, .md, .jsonl files into it."),
    ],
)
def test_sources_that_are_no_documents_are_refused(tmp_path, name, message):
    write(tmp_path / "a.pdf", "text")
    write(tmp_path / "folder" / "b.pdf", "text")
    with pytest.raises(CorpusError) as caught:
        Corpus([tmp_path / name])
    assert str(caught.value).startswith(message.format(tmp_path / name))


def test_no_source_is_refused():
    with pytest.raises(CorpusError, match="at least one file or folder of documents; got none"):
        Corpus([])


def test_file_names_that_are_not_utf8_are_refused(tmp_path):
    write(tmp_path / os.fsdecode(b"caf\xe9.txt"), "text")
    with pytest.raises(CorpusError, match=r"name of file 'caf\\udce9.txt' is not UTF-8. Rename it"):
        Corpus([tmp_path])


def test_documents_are_read_anew_each_time(tmp_path):
    path = write(tmp_path / "d.jsonl", json.dumps({"id": "a", "text": "1"}))
    corpus = Corpus([path])
    write(path, json.dumps({"id": "a", "text": "2"}))
    assert [document.text for document in corpus] == ["2"]
    path.unlink()
    with pytest.raises(CorpusError, match="cannot be read: No such file"):
        list(corpus)
