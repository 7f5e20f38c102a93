"""The Python that the pages show runs, from top to bottom of each, with tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import memory_backends.testing
from emt import MemoryConfig, attach, detach
from emt.modes.passage.likelihood import QuestionLikelihood
from emt.passage import Passage
from emt.routing.question import Asking
from memory_backends import MemoryBackend
from memory_backends.testing import BackendConformance
from tests.emt.commands import make_model
from tests.emt.routing.worlds import profile_of
from tests.pages import PAGES, python_of

Names = dict[str, Any]
TEXT = "w20 w21 w22 w23 w24 w25 w26 w27. w28 w29 w30 w31 w32 w33 w34 w35."
WORDS = {"NAME": "model", "PATH": "published", "TEXT": TEXT}
WORDS |= {"OTHER_TEXT": "w40 w41 w42", "PROMPT": "w22 w23"}
RECIPE = "docs/recipes/add-a-backend.md"
DEFINITION, USE, SUITE = python_of(RECIPE)

# It registers a searcher, which can be done once, and shows a class of tests, which pytest runs.
recipe: Names = {"__name__": __name__}
exec(DEFINITION, recipe)
exec(SUITE, recipe)
TestBruteForce: type[BackendConformance] = recipe["TestBruteForce"]


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save what `NAME` and `PATH` name, and let questions be likelier after every passage."""
    make_model(tmp_path / "model")
    make_model(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"model_type": "extended-llama", "auto_map": {"AutoConfig": "configuration.Absent"}}
    path.write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(QuestionLikelihood, "__call__", likelier_after_passages)


def likelier_after_passages(
    likelihood: QuestionLikelihood,
    asking: Asking,
    passages: Sequence[Passage],
    backend: MemoryBackend,
    *,
    beside: Sequence[Passage] | None = None,
) -> torch.Tensor:
    """Stand in for a random model, which finds no question likelier after any passage."""
    return torch.tensor([[-1.0] * 3] * len(passages) + [[-9.0] * 3])


def store_of(path: str, document: str) -> None:
    """Make the store that a page begins with, with a head profile, as `emt index` does."""
    model = AutoModelForCausalLM.from_pretrained("model")
    config = MemoryConfig(memory_type="vector_db", path=path)
    memory = attach(model, config, tokenizer=AutoTokenizer.from_pretrained("model"))
    memory.keep_profile(profile_of(AutoModelForCausalLM.from_pretrained("model")))
    memory.write(TEXT, document=document)
    memory.close()
    detach(model)


def check_readme(names: Names) -> None:
    ids = names["tokenizer"](WORDS["PROMPT"], return_tensors="pt").input_ids
    assert torch.equal(names["output"][:, : ids.shape[1]], ids)
    assert names["output"].shape[1] > ids.shape[1]
    assert {each.document for each in names["citations"]} == {"grothendieck.txt"}
    plain = AutoModelForCausalLM.from_pretrained("model")
    assert torch.equal(names["model"](ids).logits, plain(ids).logits)
    assert Path("memories/catalog.sqlite").is_file()


def check_folder(names: Names) -> None:
    assert {each.document for each in names["sentences"]} == {"notes.txt"}
    assert [each.document for each in names["passages"]] == ["notes.txt"]
    assert names["found"].passage.document == "notes.txt"
    assert sorted(names["memory"].documents) == ["b.txt", "chat/1", "notes.txt", "report.txt"]
    tokens = names["memory"].backend.catalog.document("chat/1").token_ids
    assert tokens.tolist() == names["said"][0].tolist()
    assert names["memory"].backend.catalog.metadata("report.txt") == {"year": 2025}


def check_researcher(names: Names) -> None:
    num_heads = names["model"].config.num_attention_heads
    assert names["rows"].shape == names["weights"].shape == (1, num_heads, 1, 4)
    assert names["layer"] == names["model"].config.num_hidden_layers - 1
    assert {each.document for cited in names["by_token"] for each in cited} == {"article.txt"}


def check_cluster(names: Names) -> None:
    assert names["adopted"] == (2, 0)
    assert names["before"] == ["first.txt"]
    assert names["after"] == ["first.txt", "second.txt"]


def check_settings(names: Names) -> None:
    assert names["same"] == names["config"]
    assert names["same"].max_passages == 2


def check_published(names: Names) -> None:
    model, again = names["model"], names["again"]
    num_layers, num_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert len(names["idx"]) == len(names["weights"]) == num_layers
    assert names["idx"][0].shape == (1, num_heads, 10)
    assert len(names["keys_and_values"]) == num_layers
    assert again.memory_ids == names["memory_ids"]
    plain = again(names["inputs"], topk=0).logits
    logits = again(names["inputs"]).logits
    assert torch.equal(logits, model(names["inputs"]).logits)
    assert (logits - plain).abs().max() > 1e-4


def check_scale(names: Names) -> None:
    assert [each.metadata["source"] for each in names["documents"]] == ["article.txt"]
    assert not names["memory"].backend.keeps_rows


CHECKS: dict[str, Callable[[Names], None]] = {
    "README.md": check_readme,
    "docs/quickstart.md": check_readme,
    "docs/guides/folder-of-documents.md": check_folder,
    "docs/guides/researcher.md": check_researcher,
    "docs/guides/cluster.md": check_cluster,
    "docs/scale.md": check_scale,
    "docs/settings.md": check_settings,
    "docs/published.md": check_published,
}


def test_every_page_with_python_is_checked() -> None:
    assert {page for page in PAGES if python_of(page)} == {*CHECKS, RECIPE}


@pytest.mark.parametrize("page", CHECKS)
def test_the_python_of_a_page_runs(page: str) -> None:
    if page == "docs/guides/folder-of-documents.md":
        store_of("store/", document="notes.txt")
    names: Names = dict(WORDS)
    for block in python_of(page):
        exec(block, names)
    CHECKS[page](names)


def test_the_suites_docstring_shows_a_class_of_tests() -> None:
    shown = (memory_backends.testing.__doc__ or "").partition("\n\n")[2]
    names: Names = {}
    exec(shown, names)
    assert issubclass(names["TestMine"], BackendConformance)


def test_a_model_reads_its_memories_through_the_recipes_searcher() -> None:
    names: Names = dict(WORDS)
    names["model"] = AutoModelForCausalLM.from_pretrained("model")
    names["tokenizer"] = AutoTokenizer.from_pretrained("model")
    exec(USE, names)
    assert isinstance(names["memory"].backend.searcher, recipe["BruteForce"])
    assert names["memory"].documents == ["a.txt"]
    assert names["output"].shape[1] > 2
