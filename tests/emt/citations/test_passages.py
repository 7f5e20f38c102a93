"""Citations of recalled passages: by hand, with known weights; and of real runs, by plain loops."""

import torch
import pytest

from emt import HeadProfile, MemoryConfig, attach, cite_passages
from emt.answer import generate
from emt.citations.citing import cite, cite_tokens
from emt.citations.recording import Recording
from emt.errors import MemoryUseError
from emt.passage import Passage, Recalled, Retrieved
from emt.routing.head_profile import ProfiledHead
from tests.emt.modes.passage.test_recall import left_padded
from tests.emt.words import word_tokenizer
from tests.families import build

PROMPTS = [torch.tensor(ids) for ids in ([1, 5, 9, 33], [1, 60], [1, 8, 71])]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
# 40 words in lines of 5; of the first document, rows 0 to 2 are attention sinks (<bos> has no row)
LINES = [" ".join(f"w{n}" for n in range(first, first + 5)) for first in range(10, 50, 5)]


def remembering(model_type="llama", texts=None, **settings):
    model = build(model_type, attn_implementation="eager")
    memory = attach(model, MemoryConfig(**settings), tokenizer=word_tokenizer())
    for name, text in (texts or {"a": "\n".join(LINES), "b": "\n".join(reversed(LINES))}).items():
        memory.write(text, document=name)
    return model, memory


def tiny_profile():
    """Return a profile of two heads of the tiny model, chosen for nothing."""
    heads = tuple(ProfiledHead(layer, head, 1.0) for layer, head in ((1, 0), (2, 3)))
    return HeadProfile("tiny", "none", heads, torch.zeros(2, 16), 8)


def recorded(put, *steps):
    """Make a recording of steps {layer: (ids, weights)}, each (B, H, k) nested lists."""
    recording = Recording()
    if put is not None:
        recording.recall(put)
    for step in steps:
        for layer_idx, (ids, weights) in step.items():
            ids, weights = torch.tensor(ids)[:, :, None], torch.tensor(weights)[:, :, None]
            recording.add(Retrieved(layer_idx, ids, torch.ones(ids.shape), weights))
    return recording


def described(cited):
    return [(passage.document, passage.start, passage.end, passage.text) for passage in cited]


# -- by hand ------------------------------------------------------------------------------------


def test_shares_of_known_weights():
    _, memory = remembering()
    put = [[Recalled(Passage("a", 0, 5), 0.25), Recalled(Passage("b", 10, 15), 0.5)]]
    ids = [0, 3, 4, 50, 51]  # row 0 is a sink; document b begins with row 40
    recording = recorded(
        put,
        {
            0: ([[ids, ids]], [[[0.5, 0.1, 0.0, 0.2, 0.1], [0.3, 0.1, 0.2, 0.0, 0.1]]]),
            2: ([[ids, ids]], [[[0.0, 0.0, 0.4, 0.3, 0.3], [0.1, 0.0, 0.2, 0.6, 0.0]]]),
        },
        {
            0: ([[ids, ids]], [[[0.9, 0.1, 0.0, 0.0, 0.0], [0.9, 0.0, 0.0, 0.1, 0.0]]]),
            2: ([[ids, ids]], [[[0.2, 0.0, 0.1, 0.1, 0.0], [0.5, 0.1, 0.1, 0.0, 0.0]]]),
        },
    )
    found = cite_passages(memory, recording, layers=[0, 2])
    assert described(found) == [("b", 40, 59, LINES[5]), ("a", 0, 19, LINES[0])]
    assert [passage.score for passage in found] == [0.5, 0.25]
    b, a = found
    assert b.token_attention == pytest.approx((1.6 / 4, 0.2 / 4))
    assert a.token_attention == pytest.approx((1.0 / 4, 0.4 / 4))
    assert (b.attention, a.attention) == pytest.approx((0.9 / 4, 0.7 / 4))
    (b, a) = cite_passages(memory, recording)  # the upper half of the layers
    assert (b.token_attention, a.token_attention) == (
        pytest.approx((1.2 / 2, 0.1 / 2)),
        pytest.approx((0.6 / 2, 0.3 / 2)),
    )
    found = cite_passages(memory, recording, layers=[0], num_tokens=1)
    assert [passage.token_attention for passage in found] == [
        pytest.approx((0.4 / 2,)),
        pytest.approx((0.4 / 2,)),
    ]
    assert cite_passages(memory, recording, num_tokens=0) == []


def test_a_text_without_passages_has_none():
    _, memory = remembering()
    assert cite_passages(memory, Recording()) == []
    retrieved = recorded(None, {0: ([[[5, 6]]], [[[0.5, 0.5]]])})
    assert cite_passages(memory, retrieved) == []


def test_what_was_removed_is_left_out_even_if_another_has_its_name():
    _, memory = remembering()
    put = [[Recalled(Passage(name, 10, 12), None) for name in "ab"]]
    recording = recorded(put, {0: ([[[10, 11, 50, 51]]], [[[0.1, 0.1, 0.3, 0.3]]])})
    assert [passage.document for passage in cite_passages(memory, recording)] == ["b", "a"]
    memory.remove("b")
    assert [passage.document for passage in cite_passages(memory, recording)] == ["a"]
    memory.write("\n".join(LINES), document="b")
    assert [passage.document for passage in cite_passages(memory, recording)] == ["a"]


@pytest.mark.parametrize("options", [{"sequence": 1}, {"beam_indices": [2]}, {"num_tokens": -1}])
def test_wrong_numbers_are_refused(options):
    _, memory = remembering()
    put = [[Recalled(Passage("a", 10, 11), None)]]
    with pytest.raises(MemoryUseError, match=r"must be|at least"):
        cite_passages(memory, recorded(put, {0: ([[[10]]], [[[0.5]]])}), **options)


def test_documents_of_ids_are_decoded():
    _, memory = remembering()
    memory.write(list(range(10, 60)), document="ids")
    put = [[Recalled(Passage("ids", 20, 23), None)]]
    recording = recorded(put, {0: ([[[100, 101]]], [[[0.25, 0.25]]])})
    (found,) = cite_passages(memory, recording)
    assert (found.start, found.end, found.text) == (None, None, "w30 w31 w32")
    assert found.attention == 0.5


# -- real runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_attention_is_that_of_the_weights_the_model_returns(model_type):
    model, memory = remembering(model_type)
    passages = [Passage("b", 20, 26), Passage("a", 0, 8)]
    options = {"output_attentions": True, "return_dict_in_generate": True, **GREEDY}
    with memory.recalling(passages, at=1), memory.recording() as recording:
        output = model.generate(PROMPTS[0][None], **options)
    places = {"b": range(6), "a": range(6 + 3, 6 + 8)}  # without the sinks of a, rows 0 to 2
    expected = {
        name: [
            sum(float(layer[0, :, -1, list(at)].sum()) / 4 for layer in step) / len(step)
            for step in output.attentions
        ]
        for name, at in places.items()
    }
    found = cite_passages(memory, recording, layers=range(model.config.num_hidden_layers))
    assert [passage.score for passage in found] == [None, None]
    assert found[0].attention >= found[1].attention
    assert {passage.document for passage in found} == {"a", "b"}
    for passage in found:
        assert passage.token_attention == pytest.approx(expected[passage.document], abs=1e-6)
        assert passage.attention == pytest.approx(sum(expected[passage.document]) / 5, abs=1e-6)
    # sentences and rows of the passages are cited as those of single memories are
    total = sum(map(sum, expected.values()))
    shares = dict.fromkeys("ab", 0.0)
    for citation in cite(memory, recording, top=100):
        shares[citation.document] += citation.share
    assert shares == pytest.approx({n: sum(e) / total for n, e in expected.items()}, abs=1e-6)
    for step, token in enumerate(cite_tokens(memory, recording, top=100)):
        assert {row.row for row in token} == {*range(60, 66), *range(3, 8)}
        mine = sum(row.share for row in token if row.document == "a")
        both = expected["a"][step] + expected["b"][step]
        assert mine == pytest.approx(expected["a"][step] / both, abs=1e-6)


@pytest.mark.parametrize("num_beams", [1, 2])
@torch.no_grad()
def test_each_prompt_of_a_batch_has_its_own_passages(num_beams):
    model, memory = remembering()
    ids, mask = left_padded(PROMPTS)
    passages = [[Passage("a", 10, 15)], [], [Passage("b", 5, 10), Passage("a", 30, 35)]]
    with memory.recalling(passages, at=1), memory.recording() as recording:
        output = model.generate(
            ids,
            attention_mask=mask,
            num_beams=num_beams,
            return_dict_in_generate=True,
            output_scores=True,
            **GREEDY,
        )
    for row, mine in enumerate(passages):
        beams = {} if num_beams == 1 else {"beam_indices": output.beam_indices[row]}
        found = cite_passages(memory, recording, **(beams or {"sequence": row}))
        assert {(one.document, one.text) for one in found} == {
            (one.document, quote(memory, one)) for one in mine
        }
        assert all(0 < share < 1 for one in found for share in one.token_attention)
        assert all(len(one.token_attention) == 5 for one in found)


def quote(memory, passage):
    document = memory.backend.catalog.document(passage.document)
    first, last = document.row_tokens[passage.first], document.row_tokens[passage.stop - 1]
    return document.text[document.offsets[first, 0] : document.offsets[last, 1]]


@torch.no_grad()
def test_passage_mode_says_why_each_passage_was_recalled(tmp_path):
    tiny_profile().write(tmp_path / "p.json")
    settings = {"profile": str(tmp_path / "p.json"), "passage_rows": 12, "relevance": None}
    settings["mode"] = "passage"
    model, memory = remembering(**settings)
    ids, mask = left_padded(PROMPTS)
    with memory.recording() as recording:
        model.generate(ids, attention_mask=mask, **GREEDY)
    assert len(recording.routed) == 3
    for row, routed in enumerate(recording.routed):
        found = cite_passages(memory, recording, sequence=row)
        assert {(one.document, one.text, one.score) for one in found} == {
            (one.passage.document, quote(memory, one.passage), one.score) for one in routed.passages
        }
        assert len(found) == len(routed.passages) > 1
        assert [one.attention for one in found] == sorted(
            (one.attention for one in found), reverse=True
        )


def test_an_answer_has_its_passages(tmp_path):
    tiny_profile().write(tmp_path / "p.json")
    settings = {"profile": str(tmp_path / "p.json"), "passage_rows": 12, "relevance": None}
    model, memory = remembering(**settings)
    answer = generate(model, memory, "w12 w13 w14", max_new_tokens=5, mode="passage")
    routed = memory.route("w12 w13 w14")
    assert len(answer.passages) == len(routed.passages) > 0
    assert {one.score for one in answer.passages} == {one.score for one in routed.passages}
    assert answer.citations
    assert all(answer.token_citations)
    assert {one.document for one in answer.citations} <= {one.document for one in answer.passages}
    as_json = answer.to_json()["passages"]
    assert [one["text"] for one in as_json] == [one.text for one in answer.passages]
    assert all(len(one["token_attention"]) == len(answer.token_ids) for one in as_json)
    for other in (
        generate(model, memory, "w12", max_new_tokens=3, mode="token"),
        generate(model, memory, "w12", max_new_tokens=3),
        generate(model, memory, "w12", max_new_tokens=3, mode="passage", use_memory=False),
    ):
        assert other.passages == []


def test_a_prompt_that_nothing_is_relevant_for_has_no_passages(tmp_path):
    tiny_profile().write(tmp_path / "p.json")
    settings = {"profile": str(tmp_path / "p.json"), "relevance": 1e6}
    model, memory = remembering(texts={"a": "\n".join(LINES * 4)}, mode="passage", **settings)
    answer = generate(model, memory, "w12 w13 w14", max_new_tokens=5)
    plain = generate(model, memory, "w12 w13 w14", max_new_tokens=5, use_memory=False)
    assert answer.token_ids == plain.token_ids
    assert (answer.passages, answer.citations, answer.token_citations) == ([], [], [])
