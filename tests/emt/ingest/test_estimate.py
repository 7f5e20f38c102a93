"""Estimates against what writing the corpus then makes, and what stops a run before it starts."""

import dataclasses
import time

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError, DocumentError, MemoryUseError
from emt.ingest import estimate as estimate_module
from emt.ingest.corpus import Corpus
from emt.ingest.estimate import Work, estimate
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.words import word_tokenizer
from tests.families import build


def estimated(memory, corpus, **options):
    return estimate(memory.encoder, memory.backend, memory.heads_to_index, corpus, **options)


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def corpus(tmp_path):
    """Documents of very different lengths, and of characters of one to four bytes."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "long.txt").write_text("A sentence of some words. " * 100, encoding="utf-8")
    (folder / "short.txt").write_text("Hi.", encoding="utf-8")
    (folder / "other.md").write_text("日本語のテキスト。\U0001f600" * 40, encoding="utf-8")
    return Corpus([folder])


@pytest.mark.parametrize(
    ("model_type", "memory_type", "settings"),
    [
        ("llama", "manual", {"stride": 100, "max_length": 400}),
        ("llama", "manual", {"remove_special_ids": False}),
        ("llama", "vector_db", {}),
        ("llama", "vector_db", {"layers": [1], "index": "Flat"}),
        ("llama", "vector_db", {"row_codec": "int4"}),
        ("gemma3_text", "vector_db", {}),  # one of its three layers reads memories
    ],
)
def test_estimates_are_what_is_written(tmp_path, corpus, model_type, memory_type, settings):
    model = build(model_type, vocab_size=BYTES_VOCAB_SIZE)
    store = tmp_path / "store"
    config = MemoryConfig.published(memory_type=memory_type, path=store, **settings)
    memory = attach(model, config, tokenizer=byte_tokenizer())
    expected = estimated(memory, corpus)
    assert not store.exists()
    memory.write_all((document.name, document.text) for document in corpus)
    sizes = memory.backend.catalog.document_sizes()
    assert expected.tokens == sum(tokens for _, tokens, _ in sizes)
    assert expected.rows == sum(rows for _, _, rows in sizes) == len(memory)
    if memory.config.row_codec == "exact":  # beside few rows, what a codec learned is much
        assert expected.bytes == pytest.approx(bytes_in(store), rel=0.2)
    index = bytes_in(store / "index") if memory_type == "vector_db" else 0
    assert expected.bytes == pytest.approx(bytes_in(store / "rows") + index, rel=0.05)


@pytest.mark.parametrize(
    ("num_tokens", "stride", "max_length", "carry_context"),
    [
        (300, 300, 300, False),  # one window
        (300, 40, 100, False),
        (300, 40, 100, True),
        (90, 40, 100, True),
        (700, 90, 600, True),
    ],
)
def test_work_is_that_of_the_forwards_that_are_run(num_tokens, stride, max_length, carry_context):
    """Count multiply-adds of the model's own products, and of its attention, while it encodes."""
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    config = MemoryConfig.published(
        stride=stride, max_length=max_length, carry_context=carry_context
    )
    memory = attach(model, config, tokenizer=byte_tokenizer())
    counted = dict.fromkeys(("products", "attention"), 0)

    def product(module, inputs, _):
        counted["products"] += module.weight.numel() * inputs[0].shape[1]

    def attention(module, args, kwargs):
        new, cache = kwargs["hidden_states"].shape[1], kwargs.get("past_key_values")
        before = cache.get_seq_length(module.layer_idx) if cache is not None else 0
        heads = model.config.num_attention_heads * 2 * module.head_dim
        counted["attention"] += heads * new * (before + new / 2)

    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(product)
        if hasattr(module, "layer_idx") and hasattr(module, "head_dim"):
            module.register_forward_pre_hook(attention, with_kwargs=True)
    document = memory.encoder.document(list(range(5, 105)) * 7, "d")
    document = dataclasses.replace(document, token_ids=document.token_ids[:num_tokens])
    assert sum(map(len, memory.encoder.encode(document))) == num_tokens
    reader, attached = memory.encoder.row_reader(), memory.encoder.model
    work = Work(reader, attached.query_heads, attached.layout)
    expected = counted["products"] + estimate_module._ATTENTION * counted["attention"]
    got = work.document(memory.encoder.windows, num_tokens)
    assert got == pytest.approx(expected, rel=0.02)  # norms, too, have weights


def seconds_of(folder, monkeypatch, length, **options):
    """Return the seconds of a document, by a clock that a forward and a product take 1 s of."""
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    (folder / "d.txt").write_text("x" * (length - 2))  # <bos> and <eos> are two more
    model = build("llama", vocab_size=BYTES_VOCAB_SIZE)
    windows = {"stride": 100, "max_length": 400, "carry_context": True}
    config = MemoryConfig.published(memory_type="vector_db", index="Flat", **windows)
    memory = attach(model, config, tokenizer=byte_tokenizer())
    reader, attached = memory.encoder.row_reader(), memory.encoder.model
    work = Work(reader, attached.query_heads, attached.layout)
    return estimated(memory, Corpus([folder]), **options).seconds, work, memory.encoder.windows


def test_seconds_are_those_of_the_timed_window_times_the_work(tmp_path, monkeypatch):
    for length, timed in ((50, 50), (300, 128), (9_000, 400), (3_000, 150)):
        seconds, work, windows = seconds_of(tmp_path, monkeypatch, length)
        expected = work.document(windows, length) / work.forward(timed)
        assert seconds == pytest.approx(expected)
    seconds, work, windows = seconds_of(tmp_path, monkeypatch, 300, other_tokens=1000)
    more = sum(work.forward(10) for _ in range(100))
    expected = (work.document(windows, 300) + more) / work.forward(128)
    assert seconds == pytest.approx(expected, rel=0.05)


def test_short_documents_are_timed_as_they_are_read_together(tmp_path, monkeypatch):
    lengths = [5 + number % 7 for number in range(200)]
    lines = [f'{{"id": {i}, "text": "{"x" * (n - 2)}"}}' for i, n in enumerate(lengths)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    timed, encode_all = [], estimate_module.encode_all

    def noted(reader, documents, windows):
        timed.extend(len(document.token_ids) for document in documents)
        return encode_all(reader, documents, windows)

    monkeypatch.setattr(estimate_module, "encode_all", noted)
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    memory = attach(build("llama", vocab_size=BYTES_VOCAB_SIZE), tokenizer=byte_tokenizer())
    expected = estimated(memory, Corpus([tmp_path]))
    assert timed == lengths[: len(timed)]
    assert 128 <= sum(timed) < 128 + 12
    assert expected.tokens == sum(lengths)
    assert expected.seconds == pytest.approx(sum(lengths) / sum(timed), rel=0.02)


def test_lists_take_time_to_make(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate_module, "factory_for", lambda *_: "IVF16,Flat")
    monkeypatch.setattr(estimate_module, "bytes_per_key", lambda *_: 1)
    seconds, work, windows = seconds_of(tmp_path, monkeypatch, 300)
    rows, heads = 298, 6
    indexing = rows * heads * estimate_module._INDEXING / estimate_module._MATRIX**3
    assert seconds == pytest.approx(work.document(windows, 300) / work.forward(128) + indexing)


def test_models_of_few_positions_are_timed_within_them(tmp_path):
    (tmp_path / "d.txt").write_text("w5 w6 w7")
    model = build("gpt2", n_positions=16)
    memory = attach(
        model, MemoryConfig.published(stride=16, max_length=16), tokenizer=word_tokenizer()
    )
    expected = estimated(memory, Corpus([tmp_path]))
    assert (expected.tokens, expected.rows) == (4, 3)
    assert expected.seconds > 0


def test_timing_does_not_read_the_memory(tmp_path, monkeypatch):
    (tmp_path / "d.txt").write_text("w5 w6 w7")
    memory = attach(build("llama"), tokenizer=word_tokenizer())
    memory.write("w5 w6", document="before")
    monkeypatch.setattr(memory.backend, "search", None)
    assert estimated(memory, Corpus([tmp_path])).rows == 3
    assert memory.layers == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "settings", "error", "message"),
    [
        ("w5 " * 40, {}, ConfigError, r"max_length \(40\) .* 32"),
        ("what is this", {}, DocumentError, "'b.txt' has nothing but special tokens"),
        ("w96", {}, DocumentError, "token ids of document 'b.txt' must be 0 to 95"),
        (
            "w5",
            {"max_length": 20, "carry_context": True},
            ConfigError,
            r"max_length \(20\) .* stride \(20\) \+ 5",
        ),
    ],
)
def test_what_cannot_be_written_is_found_before_the_start(tmp_path, text, settings, error, message):
    (tmp_path / "a.txt").write_text("w5 w6")
    (tmp_path / "b.txt").write_text(text)
    model = build("llama", max_position_embeddings=32, vocab_size=96)
    config = MemoryConfig.published(**{"stride": 20, "max_length": 40, **settings})
    memory = attach(model, config, tokenizer=word_tokenizer())
    with pytest.raises(error, match=message):
        estimated(memory, Corpus([tmp_path]))
    with pytest.raises(error):  # the same that writing would have found
        memory.write(text, document="b.txt")


def test_only_what_is_new_or_changed_costs(tmp_path):
    for name, text in {"same": "w5 w6", "changed": "w5 w6 w7", "new": "w8"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    memory = attach(build("llama"), tokenizer=word_tokenizer())
    memory.write("w5 w6", document="same.txt")
    memory.write("w5", document="changed.txt")
    corpus = Corpus([tmp_path])
    expected = estimated(memory, corpus)
    assert (expected.tokens, expected.rows) == (4 + 2, 3 + 1)
    memory.write_all((document.name, document.text) for document in corpus)
    assert estimated(memory, corpus) == (0, 0, 0, 0.0)


def test_it_needs_a_tokenizer_and_a_model_that_is_ready(tmp_path):
    (tmp_path / "a.txt").write_text("w5 w6")
    model = build("llama")
    with pytest.raises(MemoryUseError, match="needs a tokenizer"):
        estimated(attach(model), Corpus([tmp_path]))
    detach(model)
    memory = attach(model, tokenizer=word_tokenizer())
    model.train()
    with pytest.raises(MemoryUseError, match="in training mode"):
        estimated(memory, Corpus([tmp_path]))
