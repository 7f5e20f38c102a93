"""Files and folders to documents: what is read, exactly, and what is refused, with where it is."""

import os

import pytest

from emt.errors import CorpusError
from emt.ingest import corpus as corpus_module
from emt.ingest.corpus import Corpus
from emt.ingest.reading import SUFFIXES


def documents(*sources):
    return [(document.name, document.text) for document in Corpus(sources)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_folders_are_searched_and_sorted_by_path(tmp_path):
    for name in ("b.txt", "a/z.md", "a/B.TXT", "c.jsonl"):
        write(tmp_path / name, '{"id": "line", "text": "of c"}' if name == "c.jsonl" else name)
    for name in ("notes.png", ".hidden.txt", ".git/x.md", "a/.cache/y.txt", "README"):
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


def test_equal_names_are_kept_apart_by_the_path(tmp_path):
    for folder, text in (("one", "1"), ("two", "2"), ("other/two", "3")):
        write(tmp_path / folder / "a.txt", text)
    write(tmp_path / "d.jsonl", '{"id": "b", "text": "4"}\n{"id": "a.txt", "text": "5"}')
    folders = tmp_path / "one", tmp_path / "two", tmp_path / "other" / "two"
    assert documents(*folders, tmp_path / "d.jsonl") == [
        ("a.txt", "1"),
        ("two/a.txt", "2"),
        ("other/two/a.txt", "3"),
        ("b", "4"),
        ("d.jsonl/a.txt", "5"),
    ]


def test_an_id_that_comes_twice_is_named_with_both_lines(tmp_path):
    numbers = write(tmp_path / "n.jsonl", '{"id": "7", "text": "2"}\n\n{"id": 7, "text": "3"}')
    with pytest.raises(CorpusError, match=r"'7' is in '.*n.jsonl' line 1 and in line 3"):
        Corpus([numbers])


def test_a_file_that_is_given_twice_is_read_once(tmp_path):
    path = write(tmp_path / "folder" / "a.txt", "1")
    assert documents(path, path.parent, str(path)) == [("a.txt", "1")]


def test_every_bad_file_and_line_is_named(tmp_path):
    write(tmp_path / "a.txt", b"caf\xe9")
    write(tmp_path / "b.txt", "")
    write(tmp_path / "c.jsonl", '[1]\n{"id": "fine", "text": "1"}\n{"id": "x"}')
    write(tmp_path / "d.txt", "2")
    sources = tmp_path, tmp_path / "nothing"
    expected = ["nothing' does not", "a.txt' is not", "b.txt' is empty", "line 1 must", "line 3 "]
    with pytest.raises(CorpusError, match=r"^5 files or lines cannot be read: ") as caught:
        Corpus(sources)
    corpus = Corpus(sources, skip_errors=True)
    for errors in (caught.value.errors, corpus.errors):
        assert len(errors) == len(expected)
        for error, part in zip(errors, expected, strict=True):
            assert part in str(error)
    assert corpus.names == ["fine", "d.txt"]
    assert [document.text for document in corpus] == ["1", "2"]
    assert len(corpus.errors) == len(expected)  # named once, however often they are read


def test_nothing_but_bad_files_is_an_error(tmp_path):
    write(tmp_path / "a.txt", "")
    with pytest.raises(CorpusError, match="no document is left") as caught:
        Corpus([tmp_path], skip_errors=True)
    assert [str(error) for error in caught.value.errors] == [
        f"'{tmp_path / 'a.txt'}' is empty. Leave it out."
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "'{}' does not exist. Give a file or a folder of documents."),
        ("x" * 300, "'{}' cannot be read: File name too long."),
        ("a.png", f"expected a {', '.join(SUFFIXES)} file or a folder of them; got '{{}}'."),
        ("a.png/b.txt", "'{}' cannot be read: Not a directory."),
        ("folder", f"folder '{{}}' has no documents. Put {', '.join(SUFFIXES)} files into it."),
    ],
)
def test_sources_that_are_no_documents_are_refused(tmp_path, name, message):
    write(tmp_path / "a.png", "text")
    write(tmp_path / "folder" / "b.png", "text")
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


def test_what_was_checked_is_what_is_read(tmp_path):
    path = write(tmp_path / "d.txt", "1")
    corpus = Corpus([path])
    path.unlink()
    assert [document.text for document in corpus] == ["1"]


def test_more_than_is_kept_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_KEPT_CHARACTERS", 0)
    changed, gone = write(tmp_path / "a.txt", "1"), write(tmp_path / "b.txt", "2")
    corpora = [Corpus([tmp_path], skip_errors=skip_errors) for skip_errors in (False, True)]
    write(changed, "3")
    gone.unlink()
    with pytest.raises(CorpusError, match=r"b.txt' cannot be read: No such file"):
        list(corpora[0])
    assert [document.text for document in corpora[1]] == ["3"]
    assert "b.txt' cannot be read: No such file" in str(corpora[1].errors[0])


def test_many_files_are_read_once(tmp_path, monkeypatch):
    for number in range(300):
        write(tmp_path / f"{number:03d}.txt", str(number))
    reads, read_text = [], corpus_module.read_text

    def counted(file):
        reads.append(file.name)
        return read_text(file)

    monkeypatch.setattr(corpus_module, "read_text", counted)
    corpus = Corpus([tmp_path])
    assert [document.text for document in corpus] == [str(number) for number in range(300)]
    assert len(reads) == 300


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(CorpusError, match=r"a.txt' is no regular file"):
        Corpus([tmp_path])
