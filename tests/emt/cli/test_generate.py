"""`emt generate`: the library's answer from a store, whole or from some documents, and refusals."""

import contextlib
import io
import json

import torch
import pytest

from emt import MemoryConfig, attach
from emt.cli import main
from emt.config.memory_config import PUBLISHED_METHOD
from emt.model.loading import load
from emt.routing import router
from tests.emt.commands import ROOT, TEXTS, emt, emt_json, make_model, refused
from tests.emt.marked_sinks import first_rows_are_sinks

PROMPT = "w5 w9 w33"
METADATA = {
    "a.txt": {"year": 1999, "language": "en", "draft": False},
    "b.md": {"year": "1999", "language": "de"},
    "c": None,
}


@pytest.fixture(autouse=True)
def _all_is_relevant(monkeypatch):
    """Let every prompt be given passages: they make no question likelier for a random model."""
    judged = router.judged
    monkeypatch.setattr(router, "judged", lambda *given: judged(*given)._replace(gain=None))


def written_by_library(model, folder, names=TEXTS, **settings):
    """Write some of the documents, searched exactly; return the model and its memory."""
    loaded = load(str(model))
    config = MemoryConfig(path=str(folder / "library"), **settings)
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    memory.write_all([(name, TEXTS[name]) for name in sorted(names)])
    return loaded.model, memory


def of_library(model, folder, names=TEXTS, sampling=None, **settings):
    """Return what the library generates from some of the documents, and its recording."""
    attached, memory = written_by_library(model, folder, names, **settings)
    ids = torch.tensor([memory.tokenizer(PROMPT).input_ids])
    with memory.recording() as recording:
        output = attached.generate(ids, max_new_tokens=6, **sampling or {"do_sample": False})
    return output[0, ids.shape[1] :].tolist(), recording


def generated(store, *options):
    return emt_json("generate", "--store", store, PROMPT, "--max-new-tokens", 6, *options)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("", {}),
        ("--mode token", {"mode": "token"}),
        ("--mode token --topk 2", {"mode": "token", "topk": 2}),
        (
            "--mode token --topk 2 --uncertainty 0:12",
            {"mode": "token", "topk": 2, "uncertainty": {"entropy": 0, "topk": 12}},
        ),
        ("--no-memory", {"enabled": False}),
        ("--no-chat", {}),
    ],
)
def test_the_answer_is_the_librarys(tmp_path, model, store, options, settings):
    expected, recording = of_library(model, tmp_path, **settings)
    answer = generated(store, *options.split())
    assert answer["token_ids"] == expected
    assert answer["prompt"] == PROMPT
    assert [token["id"] for token in answer["tokens"]] == expected
    citations = recording.citations()
    assert [c["text"] for c in answer["citations"]] == [c.text for c in citations]
    assert [c["share"] for c in answer["citations"]] == pytest.approx([c.share for c in citations])
    passages = recording.citations("passage", top=None)
    assert bool(passages) == (not {"mode", "enabled"} & set(settings))
    assert [p["text"] for p in answer["passages"]] == [p.text for p in passages]
    for key in ("score", "attention"):
        values = [getattr(passage, key) for passage in passages]
        assert [p[key] for p in answer["passages"]] == pytest.approx(values)
    assert set(answer["timings"]) == {"open_seconds", "generate_seconds", "tokens_per_second"}


def test_an_option_takes_the_place_of_a_setting(tmp_path, model, store):
    config = tmp_path / "c.yaml"
    config.write_text("mode: token\ntopk: 2\n")
    of_file = generated(store, "--config", config)
    assert of_file["token_ids"] == of_library(model, tmp_path / "2", mode="token", topk=2)[0]
    of_option = generated(store, "--config", config, "--topk", "auto")  # 4 of so few rows
    assert of_option["token_ids"] == of_library(model, tmp_path / "4", mode="token", topk=4)[0]
    assert of_option["token_ids"] != of_file["token_ids"]


def test_the_published_method_is_a_config_file(tmp_path, model, documents):
    store, config = tmp_path / "new", ROOT / "configs" / "published.yaml"
    emt("index", documents, "--store", store, "--model", model, "--config", config)
    expected, recording = of_library(model, tmp_path, **PUBLISHED_METHOD)
    answer = generated(store)
    assert answer["token_ids"] == expected
    assert [c["text"] for c in answer["citations"]] == [c.text for c in recording.citations()]
    assert answer["num_retrieved"] == recording.num_retrieved


@pytest.mark.parametrize("mode", ["auto", "token"])
def test_the_text_and_its_sources_are_printed(store, mode):
    options = ("--mode", mode)
    answer = generated(store, *options)
    plain = emt("generate", "--store", store, PROMPT, "--max-new-tokens", 6, *options)
    assert (plain.out, plain.err) == (answer["text"] + "\n", "")
    options = (*options, "--citations")
    cited = emt("generate", "--store", store, PROMPT, "--max-new-tokens", 6, *options)
    lines = [answer["text"], ""]
    for rank, citation in enumerate(answer["citations"], start=1):
        where = f"{citation['document']} {citation['start']}-{citation['end']}"
        lines.append(f"[{rank}] {citation['share']:5.1%}  {where}")
        lines.append(f"      {' '.join(citation['text'].split())}")
    passages = answer["passages"]
    assert len(passages) == (0 if mode == "token" else 3)
    if passages:
        lines += ["", "3 passages recalled:"]
    for passage in passages:
        start, end = passage["start"], passage["end"]
        assert TEXTS[passage["document"]][start:end] == passage["text"]
        received = f"{passage['attention']:.1%} of the attention, score {passage['score']:.2f}"
        lines.append(f"      {passage['document']} {start}-{end}: {received}")
    assert cited.out.splitlines() == lines
    without = emt("generate", "--store", store, PROMPT, "--citations", "--no-memory")
    assert without.out.endswith("\n\nNo memory was used.\n")


@pytest.mark.parametrize("mode", ["auto", "token"])
def test_only_memory_type_changes_from_one_backend_to_the_other(tmp_path, model, documents, mode):
    store, config = tmp_path / "new", tmp_path / "c.yaml"
    config.write_text(f"memory_type: manual\nmode: {mode}\nindex: Flat\n")
    emt("index", documents, "--store", store, "--model", model, "--config", config)
    assert not (store / "index").exists()
    manual = generated(store)
    assert manual["token_ids"] == of_library(model, tmp_path, mode=mode)[0]
    config.write_text(f"memory_type: vector_db\nmode: {mode}\nindex: Flat\n")
    vector_db = generated(store, "--config", config)
    assert vector_db["token_ids"] == manual["token_ids"]
    assert [c["text"] for c in vector_db["citations"]] == [c["text"] for c in manual["citations"]]


def test_a_model_that_moved_is_named_by_hand(tmp_path, documents):
    before, store = make_model(tmp_path / "before"), tmp_path / "new"
    emt("index", documents, "--store", store, "--model", before)
    tokens = generated(store)["token_ids"]
    after = before.rename(tmp_path / "after")
    message = f"there is no model folder '{before}'; it may have been moved. Name it with --model"
    refused("generate", "--store", store, PROMPT, message=message)
    assert generated(store, "--model", after)["token_ids"] == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt is empty"),
        (["w5 \udce9"], "prompt is not UTF-8"),
        (["w5", "--chat"], "no chat template.* --no-chat"),
        (["w5", "--max-new-tokens", "5000"], "2 tokens and 5000 new ones .* 4096"),
        (["w5", "--documents", "z"], "no document 'z'"),
        (["w5", "--documents", "z\udce9"], "no document 'z"),
        (["--documents", "a.txt", PROMPT], f"no prompt, and no document '{PROMPT}' .* before"),
        (["w5", "--temperature", "-1"], "temperature must be .* got -1.0"),
        (["w5", "--top-p", "0"], "top_p must be .* got 0.0"),
        (["w5", "--seed", "-3"], "seed must be .* got -3"),
        (["w5", "--device", "meta"], "device 'meta' cannot be used"),
        (["w5", "--dtype", "float7"], "dtype must be 'auto', .* got 'float7'"),
        (["w5", "--attn-implementation", "warp"], "cannot be loaded: .*warp"),
    ],
)
def test_prompts_that_cannot_be_answered(store, arguments, message):
    refused("generate", "--store", store, *arguments, message=message)


# -- prompts from standard input ------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("arguments", [[], ["-"], ["--documents", "a.txt", "b.md", "c"]])
def test_a_prompt_may_come_from_standard_input(store, monkeypatch, arguments):
    expected = generated(store)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\ufeff{PROMPT}\r\n"))
    answer = emt_json("generate", "--store", store, "--max-new-tokens", 6, *arguments)
    assert (answer["prompt"], answer["token_ids"]) == (PROMPT, expected["token_ids"])


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (None, "the prompt is empty"),
        (io.StringIO("\n"), "the prompt is empty"),
        (Terminal(PROMPT), "there is no prompt. Give it before the options: .* standard input"),
        (io.TextIOWrapper(io.BytesIO(b"w5 \xff"), encoding="utf-8"), "the prompt is not UTF-8"),
    ],
    ids=["closed", "empty", "a terminal", "not UTF-8"],
)
def test_where_no_prompt_comes_from(store, monkeypatch, stdin, message):
    monkeypatch.setattr("sys.stdin", stdin)
    refused("generate", "--store", store, message=message)


def test_a_prompt_may_have_a_null_character(store, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5\0w9"))
    answer = emt_json("generate", "--store", store, "--max-new-tokens", 1)
    assert (answer["prompt"], len(answer["token_ids"])) == ("w5\0w9", 1)


# -- how it is generated and shown ----------------------------------------------------------------


def test_sampling_is_the_librarys(tmp_path, model, store):
    options = ["--temperature", 3.0, "--top-p", 0.9, "--seed", 7]
    sampling = {"do_sample": True, "temperature": 3.0, "top_p": 0.9}
    torch.manual_seed(7)
    expected, _ = of_library(model, tmp_path, sampling=sampling)
    assert generated(store, *options)["token_ids"] == expected
    assert generated(store, *options)["token_ids"] != generated(store)["token_ids"]


class Writes(io.StringIO):
    """Remembers what was written before each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def test_tokens_are_shown_as_they_come(store):
    text = generated(store)["text"]
    with contextlib.redirect_stdout(Writes()) as out:
        main(["generate", "--store", str(store), PROMPT, "--max-new-tokens", "6"])
    words = text.split(" ")
    begun = [" ".join(words[:number]) for number in range(1, len(words) + 1)]
    assert [seen for seen in out.seen if seen and seen != f"{text}\n"] == begun


def test_ctrl_c_leaves_what_was_shown(store, monkeypatch):
    def interrupted(*_, on_text, **__):
        on_text("w5 \x1b[2J")
        raise KeyboardInterrupt

    monkeypatch.setattr("emt.cli.generate.answer", interrupted)
    done = emt("generate", "--store", store, PROMPT, code=130)
    assert (done.out, done.err) == ("w5 \\x1b[2J\n", "emt: interrupted.\n")


def test_control_characters_do_not_reach_the_terminal(tmp_path, model):
    records = [{"id": "a\nb\x1b[2J", "text": "w5 \x1b]0;title\x07 w9 \x1b[31mw33 w7 w8"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    store = tmp_path / "new"
    emt("index", tmp_path / "d.jsonl", "--store", store, "--model", model)
    shown = emt("generate", "--store", store, PROMPT, "--citations", "--max-new-tokens", 3).out
    assert r"a\nb\x1b[2J 0-" in shown
    assert r"w5 \x1b]0;title\x07 w9" in shown
    assert all(character >= " " or character == "\n" for character in shown)


@pytest.mark.parametrize("mode", ["auto", "token"])
def test_rows_that_cannot_be_cited_are_no_unused_memory(tmp_path, model, mode):
    (tmp_path / "d.txt").write_text("w5 w9")
    store = tmp_path / "new"
    with first_rows_are_sinks(2):
        emt("index", tmp_path / "d.txt", "--store", store, "--model", model)
    assert generated(store, "--mode", mode)["num_retrieved"] > 0
    shown = emt("generate", "--store", store, PROMPT, "--mode", mode, "--citations").out
    assert "there is nothing to cite: all that was read are attention sinks" in shown
    assert ("\n1 passage recalled:\n      d.txt 0-5: 0.0% of" in shown) == (mode == "auto")


def test_a_template_that_takes_no_message_is_passed_over_and_named(tmp_path, documents):
    model, store = make_model(tmp_path / "model"), tmp_path / "new"
    (model / "chat_template.jinja").write_text("{{ raise_exception('A tool is expected.') }}")
    emt("index", documents, "--store", store, "--model", model)
    plain = emt("generate", "--store", store, PROMPT, "--no-chat")
    done = emt("generate", "--store", store, PROMPT)
    assert (done.out, plain.err) == (plain.out, "")
    assert done.err.startswith(
        "emt: the prompt is asked as a plain text: this model's chat template does not take a "
        "user's message: A tool is expected. Use --no-chat"
    )
    refused("generate", "--store", store, PROMPT, "--chat", message="this model's chat template")


# -- from some documents --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scoped(tmp_path_factory, model):
    """A store of documents with metadata."""
    folder = tmp_path_factory.mktemp("scoped")
    lines = [
        json.dumps(
            {"id": name, "text": text} | ({"metadata": METADATA[name]} if METADATA[name] else {})
        )
        for name, text in TEXTS.items()
    ]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    emt("index", folder / "lines.jsonl", "--store", folder / "store", "--model", model)
    return folder / "store"


@pytest.mark.parametrize("mode", ["auto", "token"])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--documents b.md", ["b.md"]),
        ("--documents a.txt c", ["a.txt", "c"]),
        ("--where language=de", ["b.md"]),
        ("--where year=1999", ["a.txt", "b.md"]),  # the number, or its text
        ("--where draft=false", ["a.txt"]),
        ("--where language=de --where language=en", ["a.txt", "b.md"]),
        ("--where year=1999 --where language=en", ["a.txt"]),
        ("--where year=1999 --documents c b.md", ["b.md"]),
        ("--where year=3", []),
    ],
)
def test_only_what_is_asked_for_is_read(tmp_path, model, scoped, options, names, mode):
    answer = generated(scoped, *options.split(), "--mode", mode)
    assert answer["token_ids"] == of_library(model, tmp_path, names, mode=mode)[0]
    for key, is_used in (("citations", True), ("passages", mode == "auto")):
        assert {each["document"] for each in answer[key]} <= set(names)
        assert bool(answer[key]) == (bool(names) and is_used)


# -- damaged stores -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("catalog.sqlite", "'.*store' has no catalog.sqlite"),
        ("rows/layer-001.bin", "'.*layer-001.bin' is missing; expected at least "),
        ("index/*/*.faiss", "'.*faiss' is missing; .* Run `emt rebuild`"),
    ],
)
def test_missing_files_are_named(store, pattern, message):
    path, *_ = sorted(store.glob(pattern))
    path.unlink()
    refused("generate", "--store", store, PROMPT, message=message)
