"""Chunks ranked by words, by embeddings and by both."""

import torch
import numpy as np
import pytest
from experiments.comparison.chunks import Chunks, fused
from experiments.comparison.dense import Dense
from experiments.comparison.sets import Text
from experiments.rag import BM25
from experiments.spans import Span
from transformers import AutoTokenizer, BertConfig, BertModel

from emt.errors import ConfigError
from tests.emt.words import word_tokenizer
from tests.experiments.fakes import Parrot

TEXTS = ["w3 w4 w5", "w6 w7", "w3 w8 w9 w10 w11 w12", "w13 w4"]
DOCUMENTS = [
    Text("a", " w3 w4 w5 w6  w7"),
    Text("b", "w8 w3 w9", {"year": 1}),
    Text("c", "w20 w21 w22"),
]


@pytest.fixture
def encoder(tmp_path):
    """Return the folder of a tiny encoder."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=97, intermediate_size=16, **size)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    word_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@torch.no_grad()
def cosines(encoder, texts, question):
    """Embed each text by itself, without padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), BertModel.from_pretrained(encoder)
    means = [
        model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().mean(0)
        for text in [*texts, question]
    ]
    asked = means.pop()
    return [float(mean @ asked / mean.norm() / asked.norm()) for mean in means]


def test_dense_scores_are_cosines_of_means(encoder, tmp_path):
    dense = Dense(TEXTS, str(encoder), tmp_path / "kept")
    expected = cosines(encoder, TEXTS, "w3 w4")
    assert dense.scores("w3 w4") - 1 == pytest.approx(expected, abs=1e-5)
    (path,) = (tmp_path / "kept").iterdir()
    np.save(path, np.load(path)[::-1])
    again = Dense(TEXTS, str(encoder), tmp_path / "kept")  # what was kept is not computed again
    assert again.scores("w3 w4") - 1 == pytest.approx(expected[::-1], abs=1e-5)
    others = Dense(TEXTS[:2], str(encoder), tmp_path / "kept")
    assert others.scores("w3 w4") - 1 == pytest.approx(expected[:2], abs=1e-5)


def test_an_encoder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="embedding_model 'nowhere/x/y' cannot be loaded"):
        Dense(TEXTS, "nowhere/x/y", tmp_path)


def test_ranks_are_fused():
    words, dense = np.array([0.0, 5.0, 2.0, 0.0]), np.array([0.9, 0.1, 0.8, 1.0])
    expected = [1 / 62, 1 / 61 + 1 / 64, 1 / 62 + 1 / 63, 1 / 61]
    assert fused([words, dense]) == pytest.approx(expected)
    assert list(np.argsort(-fused([dense]))) == [3, 0, 2, 1]
    assert list(fused([np.zeros(3)])) == [0, 0, 0]


@pytest.mark.parametrize("retriever", ["bm25", "dense", "hybrid"])
def test_chunks_have_their_places_and_are_ranked(encoder, tmp_path, retriever):
    chunks = Chunks(DOCUMENTS, Parrot(), 2, embedding_model=str(encoder), folder=tmp_path)
    every = chunks.best(retriever, "w3 w9", 99)
    assert sorted(chunk.span for chunk in every) == [
        Span("a", 0, 7),
        Span("a", 7, 14),
        Span("a", 14, 16),
        Span("b", 0, 6),
        Span("b", 6, 8),
        Span("c", 0, 8),
        Span("c", 8, 11),
    ]
    texts = {text.name: text.text for text in DOCUMENTS}
    for span, text in every:
        assert text == texts[span.document][span.start : span.stop]
    pieces = [chunk.text for chunk in sorted(every)]
    scores = {
        "bm25": BM25(pieces).scores("w3 w9"),
        "dense": np.array(cosines(encoder, pieces, "w3 w9")) + 1,
    }
    ranked = [scores[name] for name in ("bm25", "dense") if retriever in (name, "hybrid")]
    best = pieces[int(np.argmax(fused(ranked)))]
    assert chunks.best(retriever, "w3 w9", 1)[0].text == best


def test_only_chunks_of_allowed_documents_are_ranked(encoder, tmp_path):
    chunks = Chunks(DOCUMENTS, Parrot(), 2, embedding_model=str(encoder), folder=tmp_path)
    for retriever in ("bm25", "hybrid"):
        found = chunks.best(retriever, "w3 w4", 3, {"c"})
        assert [chunk.span.document for chunk in found] == ["c", "c"]
    assert chunks.best("bm25", "w3 w4", 3, set()) == []
