"""lm-evaluation-harness with a memory: its numbers are those of the model, computed directly."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from typing import NamedTuple

import torch
import pytest

from emt import MemoryConfig, attach
from emt.errors import ConfigError, MemoryMismatchError, MemoryUseError, StoreError
from emt.integrations import lm_eval as adapter
from emt.model.loading import load
from tests.emt.commands import TEXTS, emt, make_documents, make_model

HARNESS = "needs lm-evaluation-harness: pip install 'emt[harness]'"
PAIRS = [  # of different lengths, so that a batch is padded; the last two share a context
    ("w5 w6 w7", " w8 w9"),
    ("w40", " w41"),
    ("w20 w21 w22 w23 w24 w25", " w26 w27 w28"),
    ("w20 w21 w22 w23 w24 w25", " w60"),
]
TOPK = 3


class Place(NamedTuple):
    """A model and a store that it wrote."""

    model: str
    store: str


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    make_model(folder / "model")
    loaded = load(str(folder / "model"))
    config = MemoryConfig.published(memory_type="vector_db", path=str(folder / "store"))
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    memory.write_all(TEXTS.items())
    return Place(str(folder / "model"), str(folder / "store"))


@pytest.fixture
def language_model():
    """Return what makes lm_eval's model "emt", as its command line does."""
    pytest.importorskip("lm_eval", reason=HARNESS)
    from lm_eval.api.registry import get_model

    adapter.register()

    def make(batch_size=1, **options):
        return get_model("emt").create_from_arg_obj(
            options, {"device": "cpu", "batch_size": batch_size}
        )

    return make


@pytest.fixture
def direct(place):
    """Return a function from whether there is a memory to a plain model and its tokenizer."""

    def make(remembers):
        loaded = load(place.model)
        if remembers:
            config = MemoryConfig.published(memory_type="vector_db", path=place.store, topk=TOPK)
            attach(loaded.model, config, tokenizer=loaded.tokenizer)
        return loaded.model, loaded.tokenizer

    return make


def options_of(place, remembers):
    memory = {"store": place.store, "topk": TOPK} if remembers else {}
    return {"pretrained": place.model, **memory}


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, found, idx) for idx, found in enumerate(arguments)]


@torch.no_grad()
def scored(model, tokenizer, context, continuation):
    """Return the log-probability of a continuation, and whether greedy decoding gives it."""
    num_context = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    log_probs = model(ids).logits[0].log_softmax(-1)
    following = ids[0, num_context:]
    rows = log_probs[num_context - 1 : -1]
    return float(rows.gather(1, following[:, None]).sum()), bool(
        (rows.argmax(-1) == following).all()
    )


@torch.no_grad()
def said(model, tokenizer, context, num_tokens):
    """Return greedy tokens, each from a run over everything before it, up to the end of a text."""
    ids = tokenizer(context).input_ids
    new = []
    while len(new) < num_tokens and (not new or new[-1] != tokenizer.eos_token_id):
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("remembers", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood_is_the_model_s(place, language_model, direct, remembers, batch_size):
    model, tokenizer = direct(remembers)
    greedy = said(model, tokenizer, "w50 w51", 1)
    pairs = [*PAIRS, ("w50 w51", " " + tokenizer.decode(greedy))]
    lm = language_model(batch_size, **options_of(place, remembers))
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = [scored(model, tokenizer, *pair) for pair in pairs]
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=2e-5)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert expected[-1][1]


def test_the_memory_counts(place, direct):
    plain, with_memory = (
        [scored(*direct(remembers), *pair)[0] for pair in PAIRS] for remembers in (False, True)
    )
    assert min(abs(one - other) for one, other in zip(plain, with_memory, strict=True)) > 1e-3


@pytest.mark.parametrize("remembers", [False, True], ids=["plain", "memory"])
def test_rolling_loglikelihood_is_the_model_s(place, language_model, direct, remembers):
    lm = language_model(**options_of(place, remembers), prefix_token_id=1)
    text = "w30 w31 w60 w61"
    (found,) = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
    )
    model, tokenizer = direct(remembers)
    ids = torch.tensor([[1, *tokenizer(text).input_ids]])  # lm_eval's prefix before our <bos>
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    assert found == pytest.approx(float(log_probs.gather(1, ids[0, 1:, None]).sum()), abs=2e-5)


@pytest.mark.parametrize("remembers", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_until_is_the_model_s(place, language_model, direct, remembers, batch_size):
    model, tokenizer = direct(remembers)
    contexts = ["w5 w6 w7", "w40", "w20 w21 w22 w23 w24 w25"]
    expected = [
        tokenizer.decode(said(model, tokenizer, context, 6), skip_special_tokens=True)
        for context in contexts
    ]
    asked = {"until": [], "max_gen_toks": 6, "do_sample": False}
    lm = language_model(batch_size, **options_of(place, remembers))
    found = lm.generate_until(
        requests("generate_until", [(context, asked) for context in contexts]), disable_tqdm=True
    )
    assert found == expected
    stop = expected[0].split()[2]
    asked = {"until": [stop], "max_gen_toks": 6, "do_sample": False}
    (stopped,) = lm.generate_until(
        requests("generate_until", [(contexts[0], asked)]), disable_tqdm=True
    )
    assert stopped == expected[0].split(stop)[0]


def make_task(folder):
    """Write a task with two choices an item, and its data; return the folder."""
    folder.mkdir()
    rows = [
        {"query": context, "choices": [right.strip(), "w90"], "gold": 0} for context, right in PAIRS
    ]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(
        f"""\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
    )
    return folder


def run(monkeypatch, *arguments):
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, arguments)])
    adapter.main()


@pytest.mark.filterwarnings("default")  # what lm_eval and datasets use is theirs to mend
def test_a_task_of_one_s_own_runs_offline(place, language_model, direct, tmp_path, monkeypatch):
    import datasets.config

    called = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: called.append(address))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = f"pretrained={place.model},store={place.store},topk={TOPK},layers=[0,1,2]"
    run(
        monkeypatch,
        *("--model", "emt", "--model_args", arguments, "--tasks", "words", "--device", "cpu"),
        *("--include_path", make_task(tmp_path / "tasks"), "--output_path", tmp_path / "out"),
        "--log_samples",
    )
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    model, tokenizer = direct(True)
    expected = {
        context + right: [
            scored(model, tokenizer, context, f" {choice}")[0] for choice in (right.strip(), "w90")
        ]
        for context, right in PAIRS
    }
    right = [scores[0] > scores[1] for scores in expected.values()]
    assert results["results"]["words"]["acc,none"] == pytest.approx(sum(right) / len(right))
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found = [float(response[0][0]) for response in sample["resps"]]
        key = sample["doc"]["query"] + " " + sample["doc"]["choices"][0]
        assert found == pytest.approx(expected[key], abs=2e-5)
    assert called == []
    memory = results["config"]["memory"]
    assert (memory["documents"], memory["topk"], memory["layers"]) == (3, TOPK, [0, 1, 2])
    assert memory["rows"] > 80


def test_a_store_knows_its_model_and_settings(place, language_model, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("topk: 2")
    store = tmp_path / "store"
    documents = make_documents(tmp_path / "documents")
    emt("index", documents, "--store", store, "--model", place.model, "--config", config)
    lm = language_model(store=str(store))
    assert lm.model.name_or_path == place.model
    assert (lm.memory.config.topk, lm.memory.config.memory_type) == (2, "vector_db")
    changes = {"topk": 4, "memory_type": "manual", "mode": "token", "passage_rows": 64}
    lm = language_model(store=str(store), **changes)
    assert changes.items() <= lm.memory.config.to_dict().items()


def test_every_setting_can_be_given(language_model):
    from emt.integrations.lm_eval_model import SETTINGS

    names = {field.name for field in dataclasses.fields(MemoryConfig)}
    assert set(SETTINGS) == names - {"path", "max_length"}  # `store` and lm_eval's own


@pytest.mark.filterwarnings("default")
def test_a_model_in_hand_keeps_its_memory(place, language_model, direct):
    model, tokenizer = direct(True)
    lm = language_model(pretrained=model, tokenizer=tokenizer)
    assert lm.memory.config.topk == TOPK
    (found,) = lm.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)
    assert found[0] == pytest.approx(scored(model, tokenizer, *PAIRS[0])[0], abs=2e-5)
    with pytest.raises(MemoryUseError, match="already has a memory"):
        language_model(pretrained=model, tokenizer=tokenizer, store=place.store)


def test_a_token_for_padding_does_not_make_another_model(place, language_model, tmp_path):
    """lm_eval adds one to a tokenizer that has none to use; a store compares vocabularies."""
    make_model(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token = None
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    config = MemoryConfig.published(memory_type="vector_db", path=str(tmp_path / "store"))
    memory = attach(loaded.model, config, tokenizer=loaded.tokenizer)
    memory.write_all(TEXTS.items())
    lm = language_model(3, pretrained=str(tmp_path / "model"), store=str(tmp_path / "store"))
    assert "<|pad|>" in lm.tokenizer.get_vocab()
    assert len(lm.memory.documents) == 3


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"store": "nowhere"}, StoreError, "expected a store at 'nowhere'"),
        ({"topk": 3}, ConfigError, "topk needs a store"),
        ({"store": True, "topk": 0}, ConfigError, "topk must be a whole number"),
        ({"store": True, "top_k": 3}, ConfigError, "unknown option 'top_k'. Did you mean 'topk'"),
        ({"store": True, "mod": "token"}, ConfigError, "Did you mean 'mode'"),
        ({"path": "memories/"}, ConfigError, "store=DIRECTORY; got path"),
        ({"pretrained": "nowhere.gguf"}, ConfigError, "'nowhere.gguf' does not exist"),
    ],
)
def test_mistakes(place, language_model, options, error, said):
    if options.get("store") is True:
        options = {**options, "store": place.store}
    with pytest.raises(error, match=said):
        language_model(**{"pretrained": place.model, **options})


def test_a_store_of_another_model(place, language_model, tmp_path):
    make_model(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(MemoryMismatchError, match="num_hidden_layers"):
        language_model(pretrained=str(tmp_path / "other"), store=place.store)


def test_a_mistake_is_one_line(place, language_model, tmp_path, monkeypatch, capsys):
    arguments = f"pretrained={place.model},store={tmp_path / 'nowhere'}"
    tasks = make_task(tmp_path / "tasks")
    with pytest.raises(SystemExit) as end:
        run(
            monkeypatch,
            *("--model", "emt", "--model_args", arguments, "--tasks", "words"),
            *("--include_path", tasks, "--device", "cpu"),
        )
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("expected a store at")
    assert last.endswith("Correct the path.")


def test_without_lm_eval_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    assert end.value.code == 2
    assert "pip install 'emt[harness]'" in capsys.readouterr().err
