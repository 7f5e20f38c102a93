"""Scopes: what is out of them might as well not be in the memory."""

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError, DocumentError, MemoryUseError
from emt.ingest.changes import Written
from memory_backends import Scope
from tests.emt.words import word_tokenizer
from tests.families import VOCAB_SIZE, build

PROMPT = torch.tensor([[5, 9, 33, 60, 41, 18]])
BATCH = torch.tensor([[5, 9, 33, 60, 41, 18], [0, 0, 7, 71, 12, 50], [0, 44, 20, 31, 8, 90]])
MASK = (BATCH != 0).long()
KNOWN = {
    "a": {"year": 1999, "language": "en"},
    "b": {"year": 2001, "language": "de"},
    "c": {"year": 2001, "language": "en"},
    "d": None,
}
BACKENDS = {
    "manual": {"memory_type": "manual"},
    "Flat": {"memory_type": "vector_db", "index": "Flat"},
    "IVF": {"memory_type": "vector_db", "index": "IVF2,Flat"},
}


def texts():
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for name, length in (("a", 40), ("b", 70), ("c", 55), ("d", 61))
    }


def remembering(names="abcd", *, model=None, **settings):
    """Return a model and its memory of some documents; "d" without metadata."""
    model = model or build("llama")
    memory = attach(model, MemoryConfig.published(**settings), tokenizer=word_tokenizer())
    for name in names:
        memory.write(texts()[name], document=name, metadata=KNOWN[name])
    return model, memory


@torch.no_grad()
def logits(model, input_ids=PROMPT, mask=None):
    options = {}
    if mask is not None and model.config.model_type != "mpt":  # positions as `generate` has them
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids, attention_mask=mask, **options).logits


def generated(model, input_ids=PROMPT, mask=None, **options):
    mask = torch.ones_like(input_ids) if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids, attention_mask=mask, **options)


# -- one scope for all --------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", ["all", "one"])
@pytest.mark.parametrize("topk", [3, 50, "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scope_of_one_document_is_a_memory_of_it_alone(backend, topk, sinks):
    settings = {**BACKENDS[backend], "topk": topk, "sinks": sinks}
    model, memory = remembering(**settings)
    with memory.using(documents=["b"]):
        scoped = logits(model)
        tokens = [generated(model), generated(model, num_beams=3, num_return_sequences=2)]
    everything = logits(model)
    detach(model)
    remembering("b", model=model, **settings)
    torch.testing.assert_close(scoped, logits(model), atol=2e-6, rtol=0)
    assert tokens[0].tolist() == generated(model).tolist()
    beams = generated(model, num_beams=3, num_return_sequences=2)
    assert tokens[1].tolist() == beams.tolist()
    assert (scoped - everything).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"documents": []}, {"where": {"year": 3}}])
def test_an_empty_scope_is_the_plain_model_bit_for_bit(backend, options):
    model = build("llama")
    plain, tokens = logits(model, BATCH, MASK), generated(model, BATCH, MASK)
    _, memory = remembering(model=model, **BACKENDS[backend])
    assert not torch.equal(logits(model, BATCH, MASK), plain)
    with memory.using(**options), memory.recording() as recording:
        assert torch.equal(logits(model, BATCH, MASK), plain)
        assert torch.equal(generated(model, BATCH, MASK), tokens)
        assert memory.new_turn().num_searchable == [0]
    assert not recording


def test_documents_and_where_intersect_and_inner_blocks_decide():
    _, memory = remembering()
    rows = {name: memory.backend.catalog.scope([name]).spans[0] for name in KNOWN}

    def scope(names):
        return Scope.of(rows[name] for name in names)

    assert memory.new_turn().scopes is None
    with memory.using(where={"language": "en"}):
        assert memory.new_turn().scopes == scope("ac")
        with memory.using(documents=["c", "b", "d"]):
            assert memory.new_turn().scopes == scope("c")
            with memory.using(where={"year": [2001, 1999]}, topk=2):
                assert memory.new_turn().scopes == scope("bc")
                assert memory.config.topk == 2
                with memory.using(documents=None):
                    assert memory.new_turn().scopes == scope("abc")
            with memory.using(where=None):
                assert memory.new_turn().scopes == scope("bcd")
        with memory.using(documents=[["a"], ["b", "c"]]):
            assert memory.new_turn().scopes == (scope("a"), scope("c"))
            assert memory.new_turn().num_searchable == [40, 55]
    assert memory.new_turn().scopes is None
    assert memory.new_turn().num_searchable == [len(memory)]


def test_scopes_follow_what_is_written_and_removed():
    model, memory = remembering()
    with memory.using(documents=["a", "b"]), memory.using(where={"year": 2001}):
        before = memory.new_turn().scopes
        memory.write(texts()["a"], document="b", replace=True, metadata={"year": 2001})
        assert memory.new_turn().scopes != before
        assert memory.new_turn().num_searchable == [40]
        memory.write(texts()["b"], document="new", metadata={"year": 2001})
        with memory.using(documents=None):
            assert memory.new_turn().num_searchable == [40 + 55 + 70]
        memory.write_all([("a", texts()["a"], {"year": 2001})])
        assert memory.new_turn().num_searchable == [80]
        plain = build("llama")
        memory.remove("a", "b")
        assert memory.new_turn().num_searchable == [0]
        assert torch.equal(logits(model), logits(plain))
        with pytest.raises(DocumentError, match="no document 'a'"):
            memory.using(documents=["a"], topk=3).__enter__()
        assert memory.config.topk == 10


# -- a scope for each prompt --------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
@pytest.mark.parametrize("sinks", ["all", "one"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "mpt"])
def test_each_prompt_of_a_batch_reads_its_own(model_type, backend, sinks, chunk_bytes, monkeypatch):
    monkeypatch.setattr("emt.model.attention_call._CHUNK_BYTES", chunk_bytes)
    model, memory = remembering(model=build(model_type), **BACKENDS[backend], topk=50, sinks=sinks)
    lists = [["b"], ["d", "a"], ["b"]]
    with memory.using(documents=lists), memory.recording() as together:
        found = logits(model, BATCH, MASK)
    differs = 0.0
    with memory.using(documents=["c"]):
        others = logits(model, BATCH, MASK)
    for at, names in enumerate(lists):
        real = MASK[at].bool()
        with memory.using(documents=names), memory.recording() as alone:
            expected = logits(model, BATCH[at : at + 1, real], MASK[at : at + 1, real])
        torch.testing.assert_close(found[at, real], expected[0], atol=2e-5, rtol=0)
        differs = max(differs, float((found[at, real] - others[at, real]).abs().max()))
        for layer_idx, one in alone[0].items():
            many = together[0][layer_idx].of_sequence(at)
            k = one.ids.shape[-1]
            assert torch.equal(many.ids[..., :k], one.of_sequence(0).ids)
            assert (many.ids[..., k:] == -1).all()
            torch.testing.assert_close(
                many.weights[..., :k], one.of_sequence(0).weights, atol=2e-6, rtol=0
            )
    assert differs > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk", [4, 60])
def test_beams_and_returned_sequences_have_their_prompts_scope(backend, topk):
    model, memory = remembering(**BACKENDS[backend], topk=topk)
    lists = [["a"], ["b", "c"], ["d"]]
    options = {"num_beams": 2, "num_return_sequences": 2}
    with memory.using(documents=lists):
        together = [generated(model, BATCH, MASK), generated(model, BATCH, MASK, **options)]
    for at, names in enumerate(lists):
        real = MASK[at].bool()
        with memory.using(documents=names):
            one = generated(model, BATCH[at : at + 1, real])
            two = generated(model, BATCH[at : at + 1, real], **options)
        assert together[0][at, 6:].tolist() == one[0, real.sum() :].tolist()
        assert together[1][2 * at : 2 * at + 2, 6:].tolist() == two[:, real.sum() :].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_with_an_empty_scope_is_plain_bit_for_bit(backend, implementation):
    model = build("llama", attn_implementation=implementation)
    plain, tokens = logits(model, BATCH, MASK), generated(model, BATCH, MASK)
    _, memory = remembering(model=model, **BACKENDS[backend])
    with memory.using(documents=[["a"], [], ["b"]]), memory.recording() as recording:
        found, answers = logits(model, BATCH, MASK), generated(model, BATCH, MASK)
    assert torch.equal(found[1], plain[1])
    assert torch.equal(answers[1], tokens[1])
    assert not torch.equal(found[0], plain[0])
    assert not torch.equal(found[2], plain[2])
    for step in recording:
        for retrieved in step.values():
            assert (retrieved.ids[1] == -1).all()
            assert (retrieved.weights[1] == 0).all()
            assert (retrieved.ids[0] >= 0).all()


def test_attention_weights_of_a_batch_with_scopes():
    model, memory = remembering(model=build("llama", attn_implementation="eager"), topk=50)
    with memory.using(documents=[["a"], [], ["b", "c"]]), torch.no_grad():
        weights = model(BATCH, attention_mask=MASK, output_attentions=True).attentions
    with memory.using(documents=["a"]), torch.no_grad():
        alone = model(BATCH[:1], output_attentions=True).attentions
    for found, expected in zip(weights, alone, strict=True):
        real = MASK.bool()[:, None, :, None].expand(-1, 4, -1, 1)
        total = found.sum(-1, keepdim=True)
        torch.testing.assert_close(total[real], torch.ones(int(real.sum())), atol=1e-5, rtol=0)
        assert not found[1, ..., : 6 * 50].any()
        ours = found[0, ..., : 6 * 50].unflatten(-1, (6, 50))
        theirs = expected[0, ..., : 6 * 40].unflatten(-1, (6, 40))
        torch.testing.assert_close(ours[..., :40], theirs, atol=2e-6, rtol=0)
        assert not ours[..., 40:].any()


def test_a_batch_that_scopes_do_not_divide_is_refused():
    model, memory = remembering()
    refused = pytest.raises(MemoryUseError, match=r"for 2 prompts; got a batch of 3 sequences")
    with memory.using(documents=[["a"], ["b"]]), refused:
        logits(model, BATCH, MASK)
    with memory.using(documents=[["a"], ["b"]], enabled=False):
        assert torch.equal(logits(model, BATCH, MASK), logits(build("llama"), BATCH, MASK))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"documents": [["b"], None, ["a", "c"]]}, ["b", "abcd", "ac"]),
        ({"where": [{"year": 2001}, None, {"language": "en"}]}, ["bc", "abcd", "ac"]),
        (
            {"documents": [["a", "b"], ["d"], None], "where": [{"year": 2001}, None, {"year": 3}]},
            ["b", "d", ""],
        ),
        ({"documents": [["a"], ["b"], ["c", "d"]], "where": {"year": 2001}}, ["", "b", "c"]),
        ({"documents": ["a", "b"], "where": [{"year": 1999}, {"year": 2001}, None]}, "a b ab"),
    ],
)
def test_documents_and_where_of_each_prompt(settings, names):
    _, memory = remembering()
    catalog = memory.backend.catalog
    with memory.using(**settings):
        scopes = memory.new_turn().scopes
    names = names.split() if isinstance(names, str) else names
    assert scopes == tuple(catalog.scope(list(each)) for each in names)


# -- with the rest ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_recordings_and_citations_name_documents_in_scope(backend):
    model, memory = remembering(**BACKENDS[backend])
    scope = memory.backend.catalog.scope(["b", "d"])
    with memory.using(documents=["b", "d"]), memory.recording() as recording:
        generated(model)
    rows = {
        row for step in recording for found in step.values() for row in found.ids.flatten().tolist()
    }
    assert rows
    assert rows <= set(scope.mask(1000).nonzero()[0].tolist())
    cited = recording.citations()
    assert cited
    assert {citation.document for citation in cited} <= {"b", "d"}
    named = {row.document for token in recording.token_citations() for row in token}
    assert named
    assert named <= {"b", "d"}


def test_uncertain_steps_are_redone_in_scope():
    def run(names, documents):
        model, memory = remembering(names, topk=2)
        uncertainty = {"entropy": 0.1, "topk": 9}
        using = memory.using(documents=documents, uncertainty=uncertainty)
        with using, memory.recording() as recording:
            tokens = generated(model)
        assert recording.num_redone > 0
        return tokens.tolist(), recording.num_redone

    assert run("abcd", ["c"]) == run("c", None)
    model, memory = remembering(topk=40)
    using = memory.using(documents=["a"], uncertainty={"entropy": 0.1, "topk": 90})
    with using, memory.recording() as recording:
        generated(model)
    assert recording.num_redone == 0  # 40 rows are all there are


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"documents": ["a", "z"]}, DocumentError, "no document 'z' in this memory"),
        ({"documents": [["a"], ["z"]]}, DocumentError, "no document 'z' in this memory"),
        ({"documents": "a"}, ConfigError, "must be a list of names, .* got 'a'"),
        ({"documents": ["a", ["b"]]}, ConfigError, "or a list of them for each prompt"),
        ({"documents": [["a", 3]]}, ConfigError, "must be a list of names"),
        ({"documents": 3}, ConfigError, "got 3"),
        ({"where": [{"year": 1}, "year"]}, DocumentError, "where must be a mapping"),
        ({"where": []}, DocumentError, "where must be a mapping"),
        (
            {"documents": [["a"], ["b"]], "where": [{}, {}, {}]},
            ConfigError,
            "given for 2 prompts, and where for 3",
        ),
        ({"where": "year"}, DocumentError, "where must be a mapping"),
        ({"where": {"year": None}}, DocumentError, "got 'year': None"),
        ({"document": ["a"]}, ConfigError, "'document'. Did you mean 'documents'"),
        ({"stride": 3}, ConfigError, "documents, where; 'stride' is fixed by attach"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(settings, error, message):
    _, memory = remembering()
    with pytest.raises(error, match=message), memory.using(topk=3, **settings):
        pass
    assert memory.config.topk == 10
    assert memory.new_turn().scopes is None


# -- metadata -----------------------------------------------------------------------------------


def test_write_all_keeps_metadata_and_brings_it_up_to_date(tmp_path):
    _, memory = remembering("ab", path=str(tmp_path / "store"))
    catalog = memory.backend.catalog
    sources = texts()
    stream = [
        ("a", sources["a"]),  # says nothing: stays
        ("b", sources["b"], {"year": 5}),
        ("c", sources["c"], {"year": 6}),
        ("d", sources["d"], None),
    ]
    assert memory.write_all(stream) == Written(2, 0, 2)
    known = {name: catalog.metadata(name) for name in "abcd"}
    assert known == {"a": KNOWN["a"], "b": {"year": 5}, "c": {"year": 6}, "d": {}}
    assert memory.write_all([("b", sources["b"], {}), ("c", sources["a"])]) == Written(0, 1, 1)
    assert (catalog.metadata("b"), catalog.metadata("c")) == ({}, {})
    with pytest.raises(DocumentError, match=r"'e' .* text"):
        memory.write_all([("e", sources["a"], {"year": [1]})])
    with pytest.raises(DocumentError, match=r"'e' .* a mapping"):
        memory.write(sources["a"], document="e", metadata="year")
    assert memory.documents == ["a", "b", "d", "c"]
