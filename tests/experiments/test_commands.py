import json

import pytest

from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.experiments.fake_endpoint import KEY, Reply, completion, fake_endpoint
from tests.experiments.fakes import item, write_items
from tests.experiments.scripts import run_script
from tests.families import build

BASE = "configs/experiments/retrieval.yaml"


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


def test_results_summary_and_pictures_from_one_command(model, tmp_path):
    items = write_items(tmp_path / "items.jsonl", [item("a"), item("b", split="4k")])
    options = ["--set", f"items={items}", "--set", "max_new_tokens=4"]
    options += ["--set", "conditions=[closed_book, emt_vector_db, rag]"]
    command = ["--base", BASE, "--preset", "smoke", "--model", model, "--output", tmp_path / "out"]
    done = run("run_retrieval", *command, *options)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["occurrences.png", "results.jsonl", "retrieval.png", "summary.md"]
    text = (tmp_path / "out" / "summary.md").read_text()
    assert done.stdout.startswith(text)
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    header = json.loads(lines[0])
    assert len(lines) == 1 + 2 * 3
    assert header["settings"]["model"] == str(model)
    assert header["settings"]["memory"] == {"carry_context": True}
    again = run("plot", tmp_path / "out" / "results.jsonl", "--output", tmp_path / "drawn")
    assert len(again.stdout.splitlines()) == 3
    assert (tmp_path / "drawn" / "summary.md").read_text() == text
    other = run("run_retrieval", *command, *options, "--set", "seed=3", code=2)
    assert "(now 3)" in other.stderr


def test_a_model_behind_an_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    items = write_items(tmp_path / "items.jsonl", [item("a")])
    out = tmp_path / "out"
    command = ["--base", BASE, "--model", "endpoint:small-1", "--output", out]
    command += ["--set", f"items={items}", "--set", "endpoint={attempts: 1, parameters: {seed: 3}}"]
    refused = run("run_retrieval", *command, code=2)
    assert "Set conditions to [closed_book, document, rag]." in refused.stderr
    command += ["--set", "conditions=[closed_book, document, rag]"]
    (line,) = run("run_retrieval", *command, code=2).stderr.splitlines()
    assert line.startswith("EMT_ENDPOINT_URL is not set.")
    monkeypatch.setenv("EMT_ENDPOINT_KEY", KEY)
    with fake_endpoint(Reply(completion("Leeds"))) as (url, asked):
        monkeypatch.setenv("EMT_ENDPOINT_URL", url)
        done = run("run_retrieval", *command)
    assert [(one.body["model"], one.body["seed"]) for one in asked] == [("small-1", 3)] * 3
    written = [file.read_text() for file in out.iterdir() if file.suffix in (".md", ".jsonl")]
    assert len(written) == 2
    for text in (*written, done.stdout, done.stderr):
        assert KEY not in text
        assert url not in text
    (out / "results.jsonl").unlink()
    with fake_endpoint(Reply(b"", status=401)) as (url, _):
        monkeypatch.setenv("EMT_ENDPOINT_URL", url)
        (line,) = run("run_retrieval", *command, code=2).stderr.splitlines()
    assert "refuses the key in EMT_ENDPOINT_KEY (401" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", BASE, "--preset", "full"], "items must name a file: items=FILE; got None."),
        (["--base", BASE, "--preset", "fast"], "no preset 'fast'. They have smoke, full."),
        (["--base", BASE, "--set", "conditions=[emt]"], "unknown condition 'emt'."),
        (["--base", BASE, "--set", "topk=3"], "unknown key 'topk' in settings"),
        (["--base", BASE, "--set", "items=no.jsonl"], "items 'no.jsonl' cannot be read"),
        (["--base", BASE, "--model", "nowhere/at-all.gguf"], "does not exist"),
        (["--base", "no.yaml"], "settings 'no.yaml' cannot be read as YAML"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said, tmp_path):
    done = run("run_retrieval", *arguments, "--output", tmp_path / "out", code=2)
    (line,) = done.stderr.splitlines()
    assert said in line


def test_what_is_not_results_cannot_be_drawn(tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    (line,) = run("plot", tmp_path / "results.jsonl", code=2).stderr.splitlines()
    assert "is not a file of results" in line
    (tmp_path / "results.jsonl").write_text('{"experiment": "x", "settings": {}}\n')
    (line,) = run("plot", tmp_path / "results.jsonl", code=2).stderr.splitlines()
    assert "experiment 'x', which has no plots; interpretability, perplexity" in line
    header = {"experiment": "perplexity", "machine": "m", "revision": "r", "versions": {}}
    header["settings"] = {"model": "m", "data": "d", "memory": {}, "scored": 2, "window": 4}
    (tmp_path / "results.jsonl").write_text(json.dumps(header) + "\n")
    (line,) = run("plot", tmp_path / "results.jsonl", code=2).stderr.splitlines()
    assert line == "there are no results to draw yet. Run the experiment first."
