"""Question sets written for tests, and a model to ask: a token is a word."""

import json

from experiments.comparison.settings import ComparisonSettings

from emt.model.loading import LoadedModel
from tests.emt.routing.worlds import profile_of, tokens
from tests.emt.words import word_tokenizer
from tests.experiments.fakes import write_rows
from tests.families import build

NAMES = ("one", "two", "three")
WORDS = {
    name: [f"w{token}" for token in tokens(80, 30 + number).tolist()]
    for number, name in enumerate(NAMES)
}
ABOUT = {"what": "words", "source": "made up", "licence": "none"}


def write_set(folder, questions, documents=None, **about):
    """Write a set; documents are rows, or None for those of another set."""
    folder.mkdir(parents=True)
    (folder / "about.yaml").write_text(json.dumps({**ABOUT, **about}))
    write_rows(folder / "questions.jsonl", questions)
    if documents is not None:
        write_rows(folder / "documents.jsonl", documents)
    return str(folder)


def documents_of_words():
    """Return three documents of 80 words; "year" is in their metadata."""
    return [
        {"name": name, "text": " ".join(words), "metadata": {"year": 2000 + number}}
        for number, (name, words) in enumerate(WORDS.items())
    ]


def asking_about(name, at, **changes):
    """Return a question in the words of a document, answered by the six words at `at`."""
    words = WORDS[name]
    return {
        "id": f"{name}-{at}",
        "question": " ".join(words[at - 3 : at + 4]),
        "answers": [words[at]],
        "evidence": [{"document": name, "text": " ".join(words[at : at + 6])}],
        **changes,
    }


def unanswerable(name="none"):
    """Return a question that nothing answers."""
    return {"id": name, "question": "w5 w6 w7 w8", "answers": [], "evidence": []}


def loaded_model(folder):
    """Return a tiny model and settings of a memory that its heads find passages in."""
    model = build("llama")
    profile_of(model).write(folder / "heads.json")
    memory = {"profile": str(folder / "heads.json"), "passage_rows": 24, "relevance": None}
    return LoadedModel(model, word_tokenizer(), "tiny"), memory


def comparison(sets, memory, **changes):
    """Return settings."""
    known = {"chunk_tokens": 8, "max_new_tokens": 4, "conditions": ["passages_heads"]}
    return ComparisonSettings(**{**known, "sets": sets, "memory": memory, **changes})
