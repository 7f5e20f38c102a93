import torch
import numpy as np
import pytest

from emt import MemoryConfig, attach
from emt.errors import (
    ConfigError,
    DocumentError,
    IndexFactoryError,
    MemoryMismatchError,
    MemoryUseError,
    StoreError,
)
from emt.ingest.changes import Written
from memory_backends.rows import files
from tests.emt.marked_sinks import first_rows_are_sinks
from tests.emt.words import word_tokenizer
from tests.families import VOCAB_SIZE, build

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
TEXT = "w5 w6 w7  w8\nw9"


@pytest.fixture
def model():
    return build("llama")


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def rows_of(memory, ids):
    return [
        torch.cat(memory.backend.fetch(idx, torch.tensor([list(ids)] * 2)), dim=-1)
        for idx in memory.backend.layout.layers
    ]


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        [5, 6, 7, 8],
        (5, 6, 7, 8),
        [[5, 6, 7, 8]],
        torch.tensor([5, 6, 7, 8]),
        torch.tensor([[5, 6, 7, 8]]),
        torch.tensor([5, 6, 7, 8], dtype=torch.int32),
        np.array([5, 6, 7, 8], dtype=np.uint16),
    ],
    ids=lambda source: f"{type(source).__name__}",
)
def test_ids_in_every_form_are_the_same_rows(model, source):
    memory = attach(model)
    first = memory.write([5, 6, 7, 8], document="list")
    second = memory.write(source, document="other")
    assert (first, second) == (range(4), range(4, 8))
    assert len(memory) == 8
    assert memory.documents == ["list", "other"]
    assert all(
        torch.equal(one, other)
        for one, other in zip(rows_of(memory, first), rows_of(memory, second), strict=True)
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"T at least 1; got float64 of shape \(0,\)"),
        ([5.0, 6.0], "got float64 of shape"),
        ([[5, 6], [7, 8]], r"got int64 of shape \(2, 2\)"),
        ([[5, 6], [7]], "neither text nor token ids"),
        ([True, False], "got bool"),
        (None, "got object"),
        (torch.zeros(3, dtype=torch.bfloat16), "neither text nor token ids"),
        ([5, VOCAB_SIZE], "0 to 96; got 5 to 97"),
        ([5, -1], "0 to 96; got -1 to 5"),
        ([1, 2, 0], "has no rows to remember"),
    ],
)
def test_sources_that_are_no_document_are_refused(model, source, message):
    memory = attach(model)
    with pytest.raises(DocumentError, match=message) as caught:
        memory.write(source, document="bad")
    assert "'bad'" in str(caught.value)
    assert (len(memory), memory.documents) == (0, [])


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_must_be_text(model, name):
    with pytest.raises(DocumentError, match=rf"name .* got {name!r}"):
        attach(model).write([5], document=name)


def test_a_name_is_taken_once_unless_replaced(model):
    memory = attach(model)
    memory.write([5, 6], document="d")
    with pytest.raises(DocumentError, match="'d' is already"):
        memory.write([7, 8], document="d")
    assert memory.write([7, 8, 9], document="d", replace=True) == range(2, 5)
    assert (len(memory), memory.documents) == (3, ["d"])


def test_text_is_tokenized_and_kept(model):
    memory = attach(model, tokenizer=word_tokenizer())
    memory.write(TEXT, document="d")
    stored = memory.backend.catalog.document("d")
    assert stored.text == TEXT
    assert stored.token_ids.tolist() == [1, 5, 6, 7, 8, 9]
    assert stored.row_tokens.tolist() == [1, 2, 3, 4, 5]
    words = [TEXT[start:stop] for start, stop in stored.offsets.tolist()]
    assert words == ["", "w5", "w6", "w7", "w8", "w9"]


def test_text_needs_a_tokenizer_and_words(model):
    memory = attach(model)
    with pytest.raises(MemoryUseError, match="writing text needs a tokenizer"):
        memory.write(TEXT, document="d")
    memory.tokenizer = word_tokenizer()
    with pytest.raises(DocumentError, match="document 'd' is empty"):
        memory.write(" \n", document="d")


def test_a_tokenizer_of_another_model_is_refused():
    memory = attach(build("llama", vocab_size=20), tokenizer=word_tokenizer())
    with pytest.raises(DocumentError, match="0 to 19; got 1 to 90"):
        memory.write("w3 w90", document="d")


@pytest.mark.parametrize(
    ("settings", "tokenizer", "kept"),
    [
        ({}, False, [1, 2, 4]),
        ({}, True, [1, 2, 4]),
        ({"special_ids": [5, 1]}, True, [2, 3, 4]),
        ({"special_ids": []}, False, [0, 1, 2, 3, 4]),
        ({"remove_special_ids": False}, True, [0, 1, 2, 3, 4]),
    ],
    ids=["model's", "tokenizer's", "given", "none given", "off"],
)
def test_special_ids_have_no_row(model, settings, tokenizer, kept):
    memory = attach(
        model, MemoryConfig.published(**settings), tokenizer=word_tokenizer() if tokenizer else None
    )
    memory.write([1, 5, 6, 2, 7], document="d")
    assert memory.backend.catalog.document("d").row_tokens.tolist() == kept
    assert len(memory) == len(kept)


def test_lists_of_eos_ids_are_special(model):
    model.config.eos_token_id = [6, 2]
    memory = attach(model)
    memory.write([1, 5, 6, 2, 7], document="d")
    assert memory.backend.catalog.document("d").row_tokens.tolist() == [1, 4]


def test_write_all_stops_at_the_first_error_and_keeps_what_was_before(model):
    memory = attach(
        model, MemoryConfig.published(stride=2, max_length=4), tokenizer=word_tokenizer()
    )
    rows = []
    with pytest.raises(DocumentError, match="'b' is empty"):
        memory.write_all([("a", TEXT), ("b", " "), ("c", TEXT)], on_rows=rows.append)
    assert memory.documents == ["a"]
    assert rows == [3, 2]
    assert memory.write_all([("c", TEXT), ("d", TEXT)]) == Written(2, 0, 0)
    assert memory.documents == ["a", "c", "d"]


# -- forgetting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("how", ["remove", "clear"])
def test_an_emptied_memory_is_the_plain_model_bit_for_bit(model, memory_type, how):
    plain = logits(model)
    memory = attach(model, MemoryConfig.published(memory_type=memory_type))
    memory.write(list(range(5, 40)), document="a")
    memory.write(list(range(40, 80)), document="b")
    assert not torch.equal(logits(model), plain)
    if how == "remove":
        assert memory.remove("a", "b", "a") == 75
    else:
        memory.clear()
    assert (len(memory), memory.documents) == (0, [])
    assert torch.equal(logits(model), plain)
    assert memory.write([5, 6], document="a") == range(75, 77)


def test_removing_leaves_the_others_and_their_ids(model):
    memory = attach(model, MemoryConfig.published(topk=5))
    memory.write(list(range(40, 80)), document="b")
    only_b = logits(model)
    memory.clear()
    memory.write(list(range(5, 40)), document="a")
    rows = memory.write(list(range(40, 80)), document="b")
    assert not torch.equal(logits(model), only_b)
    assert memory.remove("a") == 35
    torch.testing.assert_close(logits(model), only_b, atol=1e-6, rtol=0)
    with memory.recording() as recorded:
        logits(model)
    assert {int(i) for found in recorded[0].values() for i in found.ids.unique()} <= set(rows)


def test_unknown_documents_remove_nothing(model):
    memory = attach(model)
    with pytest.raises(DocumentError, match=r"no document 'x'.*The documents are none"):
        memory.remove("x")
    for number in range(12):
        memory.write([5, 6], document=f"d{number}")
    with pytest.raises(DocumentError, match="d8, d9 and 2 more"):
        memory.remove("d0", "x")
    assert len(memory) == 24


# -- keeping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["manual", "vector_db"])
@pytest.mark.parametrize("writer", ["manual", "vector_db"])
def test_a_saved_memory_is_opened_by_either_backend(model, tmp_path, writer, reader):
    memory = attach(model, MemoryConfig.published(memory_type=writer, topk=4, index="Flat"))
    memory.write(list(range(5, 60)), document="d")
    expected = logits(model)
    memory.save(tmp_path / "store")
    again = build("llama")
    opened = attach(again, MemoryConfig.published(memory_type=reader, topk=4, index="Flat"))
    opened.open(tmp_path / "store")
    assert (opened.documents, len(opened)) == (["d"], 55)
    assert opened.config.path == str(tmp_path / "store")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    by_path = build("llama")
    attach(by_path, MemoryConfig.published(memory_type=reader, path=tmp_path / "store", topk=4))
    torch.testing.assert_close(logits(by_path), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_a_new_store_takes_the_codec_and_an_old_one_keeps_it(tmp_path, memory_type, monkeypatch):
    monkeypatch.setattr(files, "ROWS_TO_LEARN", 10)
    settings = {"memory_type": memory_type, "topk": 55}  # all: no step where a row is swapped
    expected = {}
    for codec in ("exact", "bfloat16", "int8"):
        other = build("llama")
        config = MemoryConfig.published(path=tmp_path / codec, row_codec=codec, **settings)
        memory = attach(other, config)
        memory.write(list(range(5, 60)), document="d")
        assert memory.backend.catalog.row_codec == codec
        expected[codec] = logits(other)
        torch.testing.assert_close(expected[codec], expected["exact"], atol=0.05, rtol=0)
        assert codec == "exact" or not torch.equal(expected[codec], expected["exact"])
    for codec, before in expected.items():
        again = build("llama")
        memory = attach(again, MemoryConfig.published(row_codec="int4", **settings))
        memory.open(tmp_path / codec)
        assert memory.backend.catalog.row_codec == codec
        torch.testing.assert_close(logits(again), before, atol=1e-6, rtol=0)
        memory.write(list(range(5, 20)), document="e")
        memory.save(tmp_path / f"copy of {codec}")


def test_stores_that_are_not_there_are_refused(model, tmp_path):
    memory = attach(model)
    memory.write([5, 6], document="d")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with pytest.raises(StoreError, match=rf"expected a memory store at '.*{name}'"):
            memory.open(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        memory.open(tmp_path / "file")
    assert (memory.config.path, memory.documents) == (None, ["d"])
    with pytest.raises(StoreError, match="this memory has no path"):
        memory.save()


def test_a_store_of_another_model_is_refused(model, tmp_path):
    memory = attach(model)
    memory.write([5, 6], document="d")
    memory.save(tmp_path / "store")
    other = build("llama", num_key_value_heads=4)
    with pytest.raises(
        MemoryMismatchError, match="num_key_value_heads: the memory has 2"
    ) as caught:
        attach(other, MemoryConfig.published(path=tmp_path / "store"))
    assert "weights" in str(caught.value)
    assert other.config._attn_implementation == "sdpa"


def test_open_within_using_stays_open(model, tmp_path):
    memory = attach(model, MemoryConfig(topk=10))
    memory.write([5, 6], document="d")
    memory.save(tmp_path / "store")
    with memory.using(topk=3):
        memory.open(tmp_path / "store")
        assert memory.config.topk == 3
    assert (memory.config.topk, memory.config.path) == (10, str(tmp_path / "store"))


# -- options ------------------------------------------------------------------------------------


def test_using_changes_options_nested_and_puts_them_back(model):
    memory = attach(model)
    memory.write(list(range(5, 60)), document="d")
    before = memory.config
    plain = logits(model)
    with memory.using(topk=3, layers=[1]) as same:
        assert same is memory
        outer = logits(model)
        with memory.using(topk=1):
            assert (memory.config.topk, memory.config.layers) == (1, (1,))
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)
        with memory.using(enabled=False):
            with memory.using(topk=2):
                off = logits(model)
            with memory.using(enabled=True):
                assert torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)
    assert memory.config == before
    assert torch.equal(logits(model), plain)
    memory.clear()
    assert torch.equal(logits(model), off)


def test_using_puts_options_back_after_errors(model):
    memory = attach(model)
    memory.write([5, 6, 7], document="d")
    before, plain = memory.config, logits(model)
    with pytest.raises(ZeroDivisionError), memory.using(topk=1, enabled=False):
        raise ZeroDivisionError
    assert memory.config == before
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 0}, "topk .* got 0"),
        ({"layers": [3]}, "0 to 2; got 3"),
        ({"layers": []}, "at least one layer index"),
        ({"top_k": 3}, "Did you mean 'topk'"),
        ({"stride": 7}, "'stride' is fixed by attach"),
        ({"sinks": "one"}, "'sinks' is fixed by attach"),
        ({"path": "x"}, "'path' is fixed by attach"),
    ],
)
def test_using_refuses_what_it_cannot_change(model, settings, message):
    memory = attach(model)
    before = memory.config
    with pytest.raises(ConfigError, match=message), memory.using(**settings):
        pass
    assert memory.config == before


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
def test_topk_above_the_rows_means_all_rows(model, memory_type):
    memory = attach(model, MemoryConfig.published(memory_type=memory_type, topk=7))
    memory.write(list(range(5, 12)), document="d")
    expected = logits(model)
    with memory.using(topk=500), memory.recording() as recorded:
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    found = recorded[0][0]
    assert found.ids.shape[-1] == 7
    assert set(found.ids.unique().tolist()) == set(range(7))


def test_mask_by_sim_above_every_cosine_is_the_plain_model(model):
    memory = attach(model, MemoryConfig.published(mask_by_sim=True, sim_threshold=1.0))
    memory.write(list(range(5, 60)), document="d")
    found = logits(model)
    with memory.using(enabled=False):
        torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=0)
    with memory.using(mask_by_sim=False):
        assert (logits(model) - found).abs().max() > 1e-2


def test_one_set_of_sinks(model):
    memory = attach(model, MemoryConfig.published(sinks="one", topk=100))
    with first_rows_are_sinks(4):
        memory.write(list(range(5, 25)), document="a")
        memory.write(list(range(25, 45)), document="b")
    with memory.recording() as recorded:
        logits(model)
    found = {int(i) for layer in recorded[0].values() for i in layer.ids.unique()}
    assert found == {*range(40)} - {20, 21, 22, 23}
    assert len(memory) == 36


def test_a_memory_can_be_off_from_the_start(model):
    plain = logits(model)
    memory = attach(model, MemoryConfig.published(enabled=False))
    memory.write([5, 6, 7], document="d")
    assert torch.equal(logits(model), plain)
    with memory.using(enabled=True):
        assert (logits(model) - plain).abs().max() > 1e-3


def test_using_blocks_may_overlap_and_each_takes_back_its_own(model):
    memory = attach(model, MemoryConfig.published(topk=10))
    memory.write(list(range(5, 60)), document="d")
    off, few = memory.using(enabled=False), memory.using(topk=3)
    plain = logits(model)
    off.__enter__()
    few.__enter__()
    assert memory.config.topk == 3
    off.__exit__(None, None, None)
    assert memory.config.topk == 3
    few.__exit__(None, None, None)
    assert memory.config.topk == 10
    assert torch.equal(logits(model), plain)


def test_a_device_without_memories_is_refused(model):
    for device in ("meta", "cuda:77"):
        with pytest.raises(MemoryMismatchError, match=f"such as 'cpu'; got '{device}'"):
            attach(model, MemoryConfig.published(memory_device=device))


def test_a_gpu_for_a_vector_db_needs_a_faiss_that_has_it(model, monkeypatch):
    monkeypatch.delattr("faiss.StandardGpuResources", raising=False)
    with pytest.raises(IndexFactoryError, match=r"'cuda:0' needs FAISS with GPU support; .* none"):
        attach(model, MemoryConfig.published(memory_type="vector_db", memory_device="cuda:0"))


def test_every_weight_is_in_the_fingerprint(tmp_path):
    model = build("llama")
    memory = attach(model, MemoryConfig.published(path=str(tmp_path / "m")))
    memory.write(list(range(5, 60)), document="d")
    for name, _ in model.named_parameters():
        other = build("llama")
        other.get_parameter(name).data.mul_(-3)
        with pytest.raises(MemoryMismatchError, match="weights: the memory has"):
            attach(other, MemoryConfig.published(path=str(tmp_path / "m")))


@pytest.mark.parametrize("memory_type", ["manual", "vector_db"])
@pytest.mark.parametrize("action", ["close", "open"])
def test_a_forward_goes_on_as_the_plain_model_when_its_rows_are_let_go_of(
    model, tmp_path, action, memory_type
):
    memory = attach(
        model, MemoryConfig.published(path=str(tmp_path / "m"), memory_type=memory_type)
    )
    memory.write(range(10, 50), document="d")
    memory.save(tmp_path / "other")
    with memory.using(layers=[0]):
        expected = logits(model)

    def let_go(*_):
        hook.remove()
        if action == "close":
            memory.close()
        else:
            memory.open(tmp_path / "other")

    hook = model.model.layers[0].register_forward_hook(let_go)
    assert torch.equal(logits(model), expected)
