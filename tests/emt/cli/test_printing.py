"""Numbers in words, and text that a terminal can show."""

import io
import json
import sys

import pytest

from emt.cli import printing


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (5e15, "5000.0 TB")],
)
def test_sizes(num_bytes, text):
    assert printing.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (9e5, "250:00:00")],
)
def test_durations(seconds, text):
    assert printing.duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "line", "lines"),
    [
        ("two\nlines\tx", r"two\nlines\tx", "two\nlines\tx"),
        ("\x1b[2J\r\x07\x00", r"\x1b[2J\r\x07\x00", r"\x1b[2J\r\x07\x00"),
        ("\x7f\x9b\u2028\udce9", r"\x7f\x9b\u2028\udce9", r"\x7f\x9b\u2028\udce9"),
        ("\u96e8 na\u00efve \u200d\U0001f600 \\n",) * 3,
        ("", "", ""),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text, line, lines):
    assert printing.one_line(text) == line
    assert printing.printable(text) == lines


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_json_is_written_in_any_encoding(monkeypatch, encoding):
    value = {"text": "\u99c5 caf\u00e9 \x9b2J \u2028 \x7f \udce9 \n", "share": 0.5}
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    printing.print_json(value)
    stdout.flush()
    line = stdout.buffer.getvalue().decode(encoding)
    assert json.loads(line) == value
    assert not any(ch < " " or "\x7f" <= ch < "\xa0" or ch == "\u2028" for ch in line.strip("\n"))
    assert ("\u99c5" in line) == (encoding == "utf-8")
