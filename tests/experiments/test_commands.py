"""The commands, in this process, with a tiny model."""

import json

import pytest

from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.commands import make_model
from tests.experiments.fakes import item, write_items, write_texts
from tests.experiments.scripts import run_script
from tests.families import build

CURVES = {
    "perplexity": ["lengths=[20, 40]", "window=24", "scored=6", "piece_tokens=null"],
    "timing": ["lengths=[20]", "query_tokens=5", "new_tokens=2", "measured=1", "rounds=1"],
}


def run(script, *arguments, code=0):
    done = run_script(script, *arguments)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("llama", vocab_size=BYTES_VOCAB_SIZE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_results_summary_and_plot_from_one_command(model, tmp_path):
    items = write_items(tmp_path / "items.jsonl", [item("a"), item("b", split="4k")])
    out = tmp_path / "out"
    command = ["retrieval", "--preset", "smoke", "--model", model, "--output", out]
    command += ["--set", f"items={items}", "--set", "max_new_tokens=4"]
    command += ["--set", "conditions=[closed_book, emt_vector_db, rag]"]
    done = run("run_experiment", *command)
    assert sorted(path.name for path in out.iterdir()) == [
        "results.jsonl",
        "retrieval.png",
        "summary.md",
    ]
    text = (out / "summary.md").read_text()
    assert done.stdout == f"{text}\nin '{out}'\n"
    lines = (out / "results.jsonl").read_text().splitlines()
    header = json.loads(lines[0])
    assert len(lines) == 1 + 2 * 3
    assert header["settings"]["model"] == str(model)
    assert header["settings"]["memory"] == {"carry_context": True}
    again = run("plot", out / "results.jsonl", "--output", tmp_path / "drawn")
    assert len(again.stdout.splitlines()) == 2
    assert (tmp_path / "drawn" / "summary.md").read_text() == text
    other = run("run_experiment", *command, "--set", "chunks=3", code=2)
    assert "(now 3)" in other.stderr
    compared = run("compare", out / "results.jsonl", "rag", "closed_book")
    assert [line.split(" | ")[1] for line in compared.stdout.splitlines()[2:]] == ["1", "1"]
    (line,) = run("compare", out / "results.jsonl", "rag", "x", code=2).stderr.splitlines()
    assert line.startswith("expected answers of rag and x to the same items")


@pytest.mark.parametrize("name", CURVES)
def test_a_second_run_measures_nothing_again(tmp_path, name):
    data = write_texts(tmp_path / "texts.jsonl", 60)
    out = tmp_path / "out"
    command = [name, "--model", make_model(tmp_path / "model"), "--output", out]
    changes = [f"data={data}", "memory={stride: 8, max_length: 16}", *CURVES[name]]
    command += [part for change in changes for part in ("--set", change)]
    done = run("run_experiment", *command)
    assert (
        "| 40 | 1 |" in done.stdout if name == "perplexity" else "| EMT vector_db |" in done.stdout
    )
    names = {path.name for path in out.iterdir()}
    assert names == {"results.jsonl", "summary.md", f"{name}.png"}
    before = (out / "results.jsonl").read_text()
    assert run("run_experiment", *command).stdout == done.stdout
    assert (out / "results.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retrieval", "--preset", "full"], "items: Input should be a valid string; got None"),
        (["retrieval", "--preset", "fast"], "no preset 'fast'. They have smoke, full."),
        (["retrieval", "--set", "conditions=[emt]"], "unknown condition 'emt'."),
        (["retrieval", "--set", "topk=3"], "unknown setting 'topk'"),
        (["retrieval", "--set", "items=no.jsonl"], "'no.jsonl' cannot be read"),
        (["retrieval", "--model", "nowhere/at-all.gguf"], "does not exist"),
        (["perplexity", "--set", "length=[20]"], "Did you mean 'lengths'?"),
        (["no.yaml"], "settings 'no.yaml' cannot be read as YAML"),
        (["nothing"], "nothing.yaml' cannot be read as YAML"),
        (
            ["configs/experiments/build_items.yaml"],
            "experiment must be one of comparison, retrieval",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said, tmp_path):
    done = run("run_experiment", *arguments, "--output", tmp_path / "out", code=2)
    (line,) = done.stderr.splitlines()
    assert said in line


def test_what_is_not_results_cannot_be_drawn(tmp_path):
    path = tmp_path / "results.jsonl"
    header = {"experiment": "perplexity", "machine": "m", "revision": "r", "versions": {}}
    for content, said in (
        ({}, "is not a file of results"),
        ({"experiment": "x", "settings": {}}, "experiment must be one of comparison, retrieval"),
        ({**header, "settings": {}}, "there are no results yet. Run the experiment first."),
    ):
        path.write_text(json.dumps(content) + "\n")
        (line,) = run("plot", path, code=2).stderr.splitlines()
        assert said in line
