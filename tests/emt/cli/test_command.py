"""What holds for every subcommand: one line for a mistake, exit codes, Ctrl-C, pipes, processes."""

import contextlib
import io
import os
from pathlib import Path

import pytest

from emt.cli import main
from memory_backends.rows.files import RowFiles
from tests.emt.cli.test_generate import PROMPT
from tests.emt.commands import contents, emt, emt_json, emt_process, refused

GENERATE = ("generate", "--store", "s", "p")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"required: COMMAND \(see `emt --help`\)$"),
        (["look"], "argument COMMAND: .*'look'"),
        (["index", "--store", "s"], r"required: source \(see `emt index"),
        (["index", "a.txt"], "required: --store"),
        ([*GENERATE, "--topk", "0"], "argument --topk: must be .* got '0'"),
        ([*GENERATE, "--topk", "-3"], "argument --topk: must be .* got '-3'"),
        ([*GENERATE, "--topk", "many"], "argument --topk: must be .* got 'many'"),
        ([*GENERATE, "--uncertainty", "1.0"], "argument --uncertainty: must be .* got '1.0'"),
        ([*GENERATE, "--max-new-tokens", "0"], "argument --max-new-tokens"),
        ([*GENERATE, "--where", "year"], "argument --where: must be KEY=VALUE.* got 'year'"),
        ([*GENERATE, "--where", "=1"], "argument --where: must be KEY=VALUE.* got '=1'"),
        ([*GENERATE, "--loud"], "unrecognized arguments: --loud"),
        (["info"], "required: DIR"),
        (["verify"], "required: DIR"),
        (["compact", "s", "--json"], "unrecognized arguments: --json"),
        (["remove", "s"], "required: document"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    refused(*arguments, message=message)


def test_help_is_still_help():
    assert emt("generate", "--help").out.startswith("usage: emt generate ")


@pytest.mark.parametrize(
    "command",
    [
        *((name, "{}") for name in ("info", "verify", "compact", "rebuild")),
        ("remove", "{}", "a.txt"),
        ("generate", "--store", "{}", PROMPT),
    ],
    ids=lambda command: command[0],
)
def test_what_is_no_store(tmp_path, command):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for name, message in (
        ("nothing", "'{}'; there is none"),
        ("empty", "'{}'; there is none"),
        ("file", "'{}'; it is a file"),
        ("folder", "'{}' has no catalog.sqlite.* is not empty"),
        ("x" * 300, "'{}' cannot be a store: File name too long"),
    ):
        path = tmp_path / name
        refused(*(part.format(path) for part in command), message=message.format(path))
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder"]


# -- what is no mistake of the user's -------------------------------------------------------------


def test_ctrl_c_keeps_what_was_finished(tmp_path, more, model, monkeypatch):
    (more / "e.txt").write_text("w50 w60")
    append, store = RowFiles.append, tmp_path / "new"

    def interrupted(self, run):
        if len(run) == 2:
            raise KeyboardInterrupt
        append(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(RowFiles, "append", interrupted)
        done = emt("index", more, "--store", store, "--model", model, code=130)
    assert done.err.splitlines()[1:] == [
        "emt: interrupted. What was finished before is kept; the same command goes on from there."
    ]
    assert [each["name"] for each in emt_json("info", store)["documents"]] == ["d.txt"]
    again = emt("index", more, "--store", store)
    assert again.out.startswith("1 document added, 1 was there already; 3 tokens, 2 rows in ")


def test_ctrl_c_in_the_first_document_leaves_no_store(tmp_path, more, model, monkeypatch):
    def interrupted(self, run):
        raise KeyboardInterrupt

    monkeypatch.setattr(RowFiles, "append", interrupted)
    emt("index", more, "--store", tmp_path / "new", "--model", model, code=130)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("module", "command", "hint"),
    [
        ("info", ["info"], ""),
        ("store", ["compact"], " The store is whole; run it again."),
        ("store", ["remove", "a.txt"], " `emt list` shows what is left."),
    ],
)
def test_ctrl_c_in_other_commands(store, monkeypatch, module, command, hint):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"emt.cli.{module}.Catalog.open", interrupted)
    done = emt(command[0], store, *command[1:], code=130)
    assert (done.out, done.err) == ("", f"emt: interrupted.{hint}\n")


def test_a_bug_of_ours_keeps_its_traceback(tmp_path, more, model, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("emt.cli.index.estimate", broken)
    with pytest.raises(ZeroDivisionError):
        emt("index", more, "--store", tmp_path / "new", "--model", model)


def test_a_reader_that_goes_away_is_no_error(store, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, contextlib.redirect_stdout(pipe):
        main(["info", str(store)])
        pipe.write("more")  # the interpreter flushes stdout once more when it ends
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["info", "{}"], ["info", "{}", "--json"], ["--help"]])
def test_a_full_disk_behind_stdout_is_one_line(store, capsys, arguments):
    for buffering in (1, -1):  # by lines, and in blocks
        with (
            Path("/dev/full").open("w", buffering) as full,
            contextlib.redirect_stdout(full),
            pytest.raises(SystemExit) as ended,
        ):
            main([part.format(store) for part in arguments])
        assert ended.value.code == 2
        assert capsys.readouterr().err == (
            "emt: reading or writing failed: No space left on device\n"
        )


def test_streams_that_are_closed_are_null_devices(store, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", None)
    main(["info", str(store)])
    with pytest.raises(SystemExit):
        main(["info", f"{store}/nothing"])


def test_what_a_stream_cannot_encode_is_escaped(tmp_path, model, monkeypatch):
    (tmp_path / "\u99c5.txt").write_text("w5 w9")
    emt("index", tmp_path / "\u99c5.txt", "--store", tmp_path / "new", "--model", model)
    for encoding, name in (("ascii", b"\\u99c5.txt"), ("utf-8", "\u99c5.txt".encode())):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stdout)
        main(["info", str(tmp_path / "new")])
        assert name in stdout.buffer.getvalue()


def test_a_process_of_its_own_prints_nothing_else(tmp_path, model, documents):
    store = tmp_path / "new"
    options = ("--store", store, PROMPT, "--max-new-tokens", 6)
    done = emt_process(
        ("index", documents, "--store", store, "--model", model),
        ("generate", *options),
        ("generate", "--chat", *options),
        code=2,
    )
    estimated, making, made, refused_chat = done.err.splitlines()
    assert estimated.startswith("3 documents, ")
    assert making.startswith("emt: no head profile of this model: one is made")
    assert made.startswith("emt: head profile: ")
    assert refused_chat.startswith("emt: this model's tokenizer has no chat template")
    indexed, text = done.out.splitlines()
    assert indexed.startswith("3 documents added; ")
    assert f"{text}\n" == emt("generate", *options).out
