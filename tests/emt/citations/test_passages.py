"""Citations of recalled passages: by hand, with known weights; and of real runs, by plain loops."""

import torch
import pytest

from emt import HeadProfile
from emt.answer import answer
from emt.passage import Passage, Recalled
from emt.routing.head_profile import ProfiledHead
from tests.emt.bytes import byte_tokenizer
from tests.emt.citations.recordings import ALL_LAYERS, document_and_text, recorded
from tests.emt.citations.recordings import remembering as remembering_documents
from tests.emt.modes.passage.recalled import left_padded

PROMPTS = [torch.tensor(ids) for ids in ([1, 5, 9, 33], [1, 60], [1, 8, 71])]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
# 40 words in lines of 5; of the first document, rows 0 to 2 are attention sinks
LINES = [" ".join(f"w{n}" for n in range(first, first + 5)) for first in range(10, 50, 5)]
DOCUMENTS = {"a": "\n".join(LINES), "b": "\n".join(reversed(LINES))}


def remembering(model_type="llama", **settings):
    return remembering_documents(DOCUMENTS, model_type, **settings)


@pytest.fixture
def routing(tmp_path):
    """Settings with a profile of two heads of the tiny model, chosen for nothing."""
    heads = tuple(ProfiledHead(layer, head, 1.0) for layer, head in ((1, 0), (2, 3)))
    HeadProfile("tiny", None, heads, torch.zeros(2, 16), 8).write(tmp_path / "p.json")
    return {"profile": str(tmp_path / "p.json"), "passage_rows": 24, "relevance": None}


# -- by hand ------------------------------------------------------------------------------------


def test_attention_of_known_weights():
    _, memory = remembering()
    recalled = [[Recalled(Passage("a", 0, 5), 0.25), Recalled(Passage("b", 10, 15), 0.5)]]
    ids = [0, 3, 4, 50, 51]  # row 0 is a sink; document b begins with row 40
    recording = recorded(
        memory,
        {
            0: ([[ids, ids]], [[[0.5, 0.1, 0.0, 0.2, 0.1], [0.3, 0.1, 0.2, 0.0, 0.1]]]),
            2: ([[ids, ids]], [[[0.0, 0.0, 0.4, 0.3, 0.3], [0.1, 0.0, 0.2, 0.6, 0.0]]]),
        },
        {
            0: ([[ids, ids]], [[[0.9, 0.1, 0.0, 0.0, 0.0], [0.9, 0.0, 0.0, 0.1, 0.0]]]),
            2: ([[ids, ids]], [[[0.2, 0.0, 0.1, 0.1, 0.0], [0.5, 0.1, 0.1, 0.0, 0.0]]]),
        },
        recalled=recalled,
    )
    b, a = citations = recording.citations("passage", layers=ALL_LAYERS)
    assert document_and_text(citations) == [("b", 40, 59, LINES[5]), ("a", 0, 19, LINES[0])]
    assert [citation.score for citation in citations] == [0.5, 0.25]
    assert b.token_attention == pytest.approx((1.6 / 4, 0.2 / 4))
    assert a.token_attention == pytest.approx((1.0 / 4, 0.4 / 4))
    assert (b.attention, a.attention) == pytest.approx((0.9 / 4, 0.7 / 4))
    assert (b.share, a.share) == pytest.approx((1.8 / 3.2, 1.4 / 3.2))
    b, a = recording.citations("passage")  # the upper half of the layers
    assert b.token_attention == pytest.approx((1.2 / 2, 0.1 / 2))
    assert a.token_attention == pytest.approx((0.6 / 2, 0.3 / 2))
    b, a = recording.citations("passage", layers=[0], num_tokens=1)
    assert b.token_attention == a.token_attention == pytest.approx((0.4 / 2,))
    assert recording.citations("passage", num_tokens=0) == []
    assert [citation.document for citation in recording.citations("passage", top=1)] == ["b"]
    sentences = recording.citations(layers=ALL_LAYERS)  # those of the passages
    assert document_and_text(sentences) == document_and_text(citations)
    assert [c.token_attention for c in sentences] == [c.token_attention for c in citations]


def test_a_text_without_passages_has_none():
    _, memory = remembering()
    assert recorded(memory, {2: ([[[5, 6]]], [[[0.5, 0.5]]])}).citations("passage") == []


def test_what_was_removed_is_left_out_even_if_another_has_its_name():
    _, memory = remembering()
    recalled = [[Recalled(Passage(name, 10, 12)) for name in "ab"]]
    step = {2: ([[[10, 11, 50, 51]]], [[[0.1, 0.1, 0.3, 0.3]]])}
    recording = recorded(memory, step, recalled=recalled)
    assert [citation.document for citation in recording.citations("passage")] == ["b", "a"]
    memory.remove("b")
    assert [(c.document, c.share) for c in recording.citations("passage")] == [("a", 1.0)]
    memory.write(DOCUMENTS["b"], document="b")
    assert [citation.document for citation in recording.citations("passage")] == ["a"]


def test_passages_without_attention_are_cited_too():
    _, memory = remembering()
    recalled = [[Recalled(Passage("a", 0, 2)), Recalled(Passage("a", 10, 12))]]  # the first: sinks
    step = {2: ([[[0, 1, 10, 11]]], [[[0.5, 0.5, 0.0, 0.0]]])}
    citations = recorded(memory, step, recalled=recalled).citations("passage")
    assert [(c.text, c.share, c.attention) for c in citations] == [
        ("w10 w11", 0.0, 0.0),
        ("w20 w21", 0.0, 0.0),
    ]


def test_documents_of_ids_are_decoded():
    _, memory = remembering()
    memory.write(list(range(10, 60)), document="ids")
    recalled = [[Recalled(Passage("ids", 20, 23))]]
    step = {2: ([[[100, 101]]], [[[0.25, 0.25]]])}
    (citation,) = recorded(memory, step, recalled=recalled).citations("passage")
    assert document_and_text([citation]) == [("ids", None, None, "w30 w31 w32")]
    assert citation.attention == 0.5


@pytest.mark.parametrize(("first", "stop"), [(10, 20), (11, 12), (12, 14), (0, 1)])
def test_passages_of_ids_are_quoted_in_whole_characters(first, stop):
    text = "灯台守の猫は、霧の夜になると石段に座って"
    ids = byte_tokenizer()(text).input_ids[1:-1]
    _, memory = remembering_documents({"ids": ids}, tokenizer=byte_tokenizer())
    step = {2: ([[list(range(first, stop))]], [[[0.5] * (stop - first)]])}
    recalled = [[Recalled(Passage("ids", first, stop))]]
    (citation,) = recorded(memory, step, recalled=recalled).citations("passage")
    start, end = -(-first // 3), -(-stop // 3)  # three bytes a character
    assert citation.text == text[start:end] or (start == end and citation.text == text[end - 1])


def tokens_of(memory, name, first, stop):
    document = memory.backend.catalog.document(name)
    return document.token_ids[document.row_tokens[first:stop]].tolist()


# -- real runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_attention_is_that_of_the_weights_the_model_returns(model_type):
    model, memory = remembering(model_type)
    passages = [Passage("b", 20, 26), Passage("a", 0, 8)]
    options = {"output_attentions": True, "return_dict_in_generate": True, **GREEDY}
    with memory.recalling(passages, at=1), memory.recording() as recording:
        output = model.generate(PROMPTS[0][None], **options)
    columns = {"b": range(6), "a": range(6 + 3, 6 + 8)}  # without the sinks of a, rows 0 to 2
    expected = {
        name: [
            sum(float(layer[0, :, -1, list(of_name)].sum()) / 4 for layer in step) / len(step)
            for step in output.attentions
        ]
        for name, of_name in columns.items()
    }
    citations = recording.citations("passage", layers=ALL_LAYERS)
    assert {(citation.document, citation.score) for citation in citations} == {
        ("a", None),
        ("b", None),
    }
    copied = {
        name: sum(
            float(layer[0, :, -1, column].sum())
            for step, said in zip(output.attentions, output.sequences[0, -5:], strict=True)
            for layer in step
            for column, token in zip(columns[name], tokens, strict=True)
            if token == said
        )
        for name, tokens in {
            "b": tokens_of(memory, "b", 20, 26),
            "a": tokens_of(memory, "a", 3, 8),
        }.items()
    }
    assert [(c.copied, c.share) for c in citations] == sorted(
        ((c.copied, c.share) for c in citations), reverse=True
    )
    total, total_copied = sum(map(sum, expected.values())), sum(copied.values()) or 1.0
    for citation in citations:
        attention = expected[citation.document]
        assert citation.token_attention == pytest.approx(attention, abs=1e-6)
        assert citation.attention == pytest.approx(sum(attention) / 5, abs=1e-6)
        assert citation.share == pytest.approx(sum(attention) / total, abs=1e-6)
        part = copied[citation.document] / total_copied
        assert citation.copied == pytest.approx(part, abs=1e-5)
    # sentences and rows of the passages are cited as those of single memories are
    shares = dict.fromkeys("ab", 0.0)
    for citation in recording.citations(layers=ALL_LAYERS, top=None):
        shares[citation.document] += citation.share
    assert shares == pytest.approx({n: sum(e) / total for n, e in expected.items()}, abs=1e-6)
    for step, token in enumerate(recording.token_citations(layers=ALL_LAYERS, top=None)):
        assert {row.row for row in token} == {*range(60, 66), *range(3, 8)}
        of_a = sum(row.share for row in token if row.document == "a")
        both = expected["a"][step] + expected["b"][step]
        assert of_a == pytest.approx(expected["a"][step] / both, abs=1e-6)


@pytest.mark.parametrize("num_beams", [1, 2])
@torch.no_grad()
def test_each_prompt_of_a_batch_has_its_own_passages(num_beams):
    model, memory = remembering()
    ids, mask = left_padded(PROMPTS)
    passages = [[Passage("a", 10, 15)], [], [Passage("b", 5, 10), Passage("a", 30, 35)]]
    options = {"num_beams": num_beams, "return_dict_in_generate": True, "output_scores": True}
    with memory.recalling(passages, at=1), memory.recording() as recording:
        output = model.generate(ids, attention_mask=mask, **options, **GREEDY)
    for row, of_prompt in enumerate(passages):
        beams = {} if num_beams == 1 else {"beam_indices": output.beam_indices[row]}
        citations = recording.citations("passage", **(beams or {"sequence": row}))
        assert {(citation.document, citation.text) for citation in citations} == {
            (passage.document, quote(memory, passage)) for passage in of_prompt
        }
        for citation in citations:
            assert len(citation.token_attention) == 5
            assert all(0 < attention < 1 for attention in citation.token_attention)


def quote(memory, passage):
    document = memory.backend.catalog.document(passage.document)
    first, last = document.row_tokens[passage.first], document.row_tokens[passage.stop - 1]
    return document.text[document.offsets[first, 0] : document.offsets[last, 1]]


@torch.no_grad()
def test_passage_mode_says_why_each_passage_was_recalled(routing):
    model, memory = remembering(mode="passage", **routing)
    ids, mask = left_padded(PROMPTS)
    with memory.recording() as recording:
        model.generate(ids, attention_mask=mask, **GREEDY)
    assert len(recording.routed) == 3
    for row, routed in enumerate(recording.routed):
        citations = recording.citations("passage", sequence=row)
        assert {(citation.document, citation.text, citation.score) for citation in citations} == {
            (each.passage.document, quote(memory, each.passage), each.score)
            for each in routed.passages
        }
        assert len(citations) == len(routed.passages) > 1
        order = [(citation.copied, citation.attention) for citation in citations]
        assert order == sorted(order, reverse=True)


def test_an_answer_has_its_passages(routing):
    model, memory = remembering(**routing)
    answered = answer(model, memory, "w12 w13 w14", max_new_tokens=5, mode="passage")
    routed = memory.route("w12 w13 w14")
    assert len(answered.passages) == len(routed.passages) > 0
    assert {each.score for each in answered.passages} == {each.score for each in routed.passages}
    assert all(answered.token_citations)
    documents = {each.document for each in answered.passages}
    assert {each.document for each in answered.citations} <= documents
    as_json = answered.to_json()["passages"]
    assert [each["text"] for each in as_json] == [each.text for each in answered.passages]
    for settings in ({"mode": "token"}, {}, {"mode": "passage", "enabled": False}):
        assert answer(model, memory, "w12", max_new_tokens=3, **settings).passages == []


def test_a_prompt_that_nothing_is_relevant_for_has_no_passages(routing):
    documents = {"a": "\n".join(LINES * 4)}
    settings = {**routing, "mode": "passage", "relevance": 1e6}
    model, memory = remembering_documents(documents, **settings)
    answered = answer(model, memory, "w12 w13 w14", max_new_tokens=5)
    plain = answer(model, memory, "w12 w13 w14", max_new_tokens=5, enabled=False)
    assert answered.token_ids == plain.token_ids
    assert (answered.passages, answered.citations, answered.token_citations) == ([], [], [])
