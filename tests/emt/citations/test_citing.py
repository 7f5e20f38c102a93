"""Citations of sentences and rows: by hand, with known weights; of real runs, by plain loops."""

import unicodedata
from collections import defaultdict

import torch
import pytest

from emt.errors import MemoryUseError
from emt.passage import Retrieved
from tests.emt.bytes import byte_tokenizer
from tests.emt.citations.recordings import (
    ALL_LAYERS,
    document_and_text,
    one_step,
    recorded,
    remembering,
)

PARTS = ("ids", "scores", "weights")


# -- by hand; token n of a text of words is row n - 1 ---------------------------------------------


def test_shares_of_known_weights():
    # rows 0 to 2 and 8 to 10 are attention sinks
    _, memory = remembering({"a": "w3 w4 w5 w6 w7 w8\nw9 w10", "b": [11, 12, 13, 14, 15, 16]})
    recording = recorded(
        memory,
        {
            0: ([[[4, 0], [6, 5]]], [[[0.1, 0.9], [0.2, 0.1]]]),
            2: ([[[13, 4], [-1, -1]]], [[[0.2, 0.1], [0.0, 0.0]]]),
        },
        {
            0: ([[[7, 8], [12, 9]]], [[[0.3, 0.5], [0.0, 0.4]]]),
            2: ([[[5], [5]]], [[[0.05], [0.05]]]),
        },
    )
    # content: row 4: .1 + .1, 5: .1 + .05 + .05, 6: .2, 7: .3, 13: .2; row 12 weighs nothing;
    # rows 0, 8 and 9 are sinks
    citations = recording.citations(layers=ALL_LAYERS)
    assert document_and_text(citations) == [
        ("a", 18, 24, "w9 w10"),
        ("a", 0, 17, "w3 w4 w5 w6 w7 w8"),
        ("b", None, None, "w11 w12 w13 w14 w15 w16"),
    ]
    assert [c.share for c in citations] == pytest.approx([0.5 / 1.1, 0.4 / 1.1, 0.2 / 1.1])
    per_token = [(0.2 / 4, 0.3 / 4), (0.3 / 4, 0.1 / 4), (0.2 / 4, 0.0)]  # 2 layers of 2 heads
    for citation, expected in zip(citations, per_token, strict=True):
        assert citation.token_attention == pytest.approx(expected)
        assert citation.attention == pytest.approx(sum(expected) / 2)
        assert citation.score is None
    rows = recording.token_citations(layers=ALL_LAYERS)
    assert [[(r.row, r.document, r.token) for r in token] for token in rows] == [
        [(4, "a", 5), (6, "a", 7), (13, "b", 5)],
        [(7, "a", 8), (5, "a", 6)],
    ]
    assert [[r.share for r in token] for token in rows] == [
        pytest.approx([0.2 / 0.7, 0.2 / 0.7, 0.2 / 0.7]),
        pytest.approx([0.3 / 0.4, 0.1 / 0.4]),
    ]
    for top, expected in ((0, 0), (1, 1), (None, 3)):
        assert len(recording.citations(layers=ALL_LAYERS, top=top)) == expected
    assert [len(token) for token in recording.token_citations(layers=ALL_LAYERS, top=1)] == [1, 1]


def test_what_was_copied_comes_first():
    _, memory = remembering({"a": "w3 w4 w5 w6 w7 w8\nw9 w10", "b": [11, 12, 13, 14, 15, 16]})
    steps = [
        {2: ([[[4, 7, 12]]], [[[0.5, 0.02, 0.1]]])},  # w7, w10 and w15
        {2: ([[[12, 6, 5]]], [[[0.03, 0.2, 0.1]]])},  # w15, w9 and w8
    ]
    by_said = {
        (10, 15): [("w9 w10", 0.4), ("w11 w12 w13 w14 w15 w16", 0.6), ("w3 w4 w5 w6 w7 w8", 0)],
        (10, 9): [("w9 w10", 1), ("w3 w4 w5 w6 w7 w8", 0), ("w11 w12 w13 w14 w15 w16", 0)],
        (90, 4): [("w3 w4 w5 w6 w7 w8", 0), ("w9 w10", 0), ("w11 w12 w13 w14 w15 w16", 0)],
        None: [("w3 w4 w5 w6 w7 w8", 0), ("w9 w10", 0), ("w11 w12 w13 w14 w15 w16", 0)],
    }
    shares = {"w3 w4 w5 w6 w7 w8": 0.6, "w9 w10": 0.22, "w11 w12 w13 w14 w15 w16": 0.13}
    for said, expected in by_said.items():
        recording = recorded(memory, *steps, said=None if said is None else [list(said)])
        citations = recording.citations()
        expected = sorted(expected, key=lambda pair: -pair[1])
        assert [(c.text, pytest.approx(c.copied)) for c in citations] == expected
        for citation in citations:
            assert citation.share == pytest.approx(shares[citation.text] / 0.95)
        assert recording.citations(top=1) == citations[:1]
    rows = recorded(memory, *steps, said=[[10, 15]]).token_citations(top=2)
    assert [[row.row for row in token] for token in rows] == [[7, 4], [12, 6]]
    assert rows[0][0].share == pytest.approx(0.02 / 0.62)


def test_the_upper_half_of_the_layers_counts_unless_others_are_named():
    _, memory = remembering({"a": list(range(10, 18)), "b": list(range(20, 28))})
    weights = [[[0.2]]]
    recording = recorded(
        memory, {0: ([[[5]]], weights), 1: ([[[13]]], weights), 2: ([[[14]]], weights)}
    )
    (row,) = recording.citations()  # layers 1 and 2
    assert (row.document, row.share, row.attention) == ("b", 1.0, pytest.approx(0.2))
    (token,) = recording.token_citations()
    assert [(row.row, row.share) for row in token] == [(13, 0.5), (14, 0.5)]
    shares = {c.document: c.share for c in recording.citations(layers=ALL_LAYERS)}
    assert shares == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert [(c.document, c.share) for c in recording.citations(layers=[0])] == [("a", 1.0)]
    only_lower = recorded(memory, {0: ([[[5]]], weights)})  # so all that there are count
    assert [c.document for c in only_lower.citations()] == ["a"]
    assert only_lower.citations(layers=[1, 2]) == []


def test_of_a_whole_prompt_the_last_query_counts():
    _, memory = remembering({"a": list(range(10, 18)), "b": list(range(20, 28))})
    recording = memory.new_recording(whole_prompt=True)
    ids = torch.tensor([[[[5], [14]]]])  # (B, H, Q, k)
    recording.add(Retrieved(2, ids, torch.ones(ids.shape), torch.full(ids.shape, 0.5)))
    assert [(c.document, c.attention) for c in recording.citations()] == [("b", 0.5)]
    assert [[r.row for r in token] for token in recording.token_citations()] == [[14]]


def test_only_the_first_tokens_if_asked():
    _, memory = remembering({"a": "w3 w4 w5 w6 w7\nw8"})
    recording = recorded(memory, *({2: ([[[row]]], [[[0.5]]])} for row in (4, 5, 5)))
    first, second = "w3 w4 w5 w6 w7", "w8"
    for num_tokens, expected in {
        0: [],
        1: [(first, 1)],
        2: [(first, 0.5), (second, 0.5)],
        9: [(second, pytest.approx(2 / 3)), (first, pytest.approx(1 / 3))],
    }.items():
        citations = recording.citations(num_tokens=num_tokens)
        assert [(c.text, c.share) for c in citations] == expected
    assert len(recording.token_citations(num_tokens=2)) == 2


@pytest.mark.parametrize(
    "weights",
    [None, {0: 0.5, 2: 0.2}, {4: 0.0, 5: 0.0}, {-1: 0.0}],
    ids=["nothing", "sinks", "masked", "no rows"],
)
def test_without_mass_there_is_nothing_to_cite(weights):
    _, memory = remembering({"a": "w3 w4 w5 w6 w7 w8"})
    recording = memory.new_recording() if weights is None else one_step(memory, weights)
    assert recording.citations() == recording.citations("passage") == []
    assert recording.token_citations() == [[] for _ in recording]


def test_sequences_of_a_batch_and_beams():
    _, memory = remembering({"a": "w3 w4 w5 w6 w7\nw8\nw9"})
    recording = recorded(
        memory,
        {2: ([[[4]], [[5]], [[6]]], [[[0.5]]] * 3)},
        {2: ([[[5]], [[6]], [[4]]], [[[0.5]]] * 3)},
    )
    lines = {4: "w3 w4 w5 w6 w7", 5: "w8", 6: "w9"}
    for sequence, rows in enumerate(([4, 5], [5, 6], [6, 4])):
        citations = recording.citations(sequence=sequence)
        assert {c.text for c in citations} == {lines[row] for row in rows}
        tokens = recording.token_citations(sequence=sequence)
        assert [[r.row for r in token] for token in tokens] == [[row] for row in rows]
    beams = torch.tensor([2, 0, -1, -1])
    assert [r[0].row for r in recording.token_citations(beam_indices=beams)] == [6, 5]
    assert [r[0].row for r in recording.token_citations(beam_indices=[2])] == [6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": 1}, "^sequence .*0 to 0.* got 1"),
        ({"sequence": -1}, "^sequence .*0 to 0.* got -1"),
        ({"beam_indices": [3]}, "^beam_indices .*0 to 0.* got 3"),
        ({"num_tokens": -1}, "^num_tokens .* at least 0; got -1"),
        ({"top": -1}, "^top .* at least 0; got -1"),
    ],
)
def test_wrong_numbers_and_words_are_refused(options, message):
    _, memory = remembering({"a": "w3 w4 w5 w6 w7"})
    recording = one_step(memory, {4: 0.5})
    for call in (
        lambda: recording.citations(**options),
        lambda: recording.citations("passage", **options),
        lambda: recording.token_citations(**options),
    ):
        with pytest.raises(MemoryUseError, match=message):
            call()
    with pytest.raises(MemoryUseError, match=r"^by must be .* got 'word'"):
        recording.citations("word")


def test_what_was_removed_is_left_out_and_the_others_stay_who_they_are():
    _, memory = remembering({name: [5, 6, 7, 8, n] for n, name in enumerate("abc", start=20)})
    recording = one_step(memory, {4: 0.1, 9: 0.6, 14: 0.3})
    memory.remove("b")
    memory.write([5, 6, 7, 8, 30], document="b")  # another b, of rows 15 to 19
    shares = {c.document: c.share for c in recording.citations()}
    assert shares == pytest.approx({"a": 0.25, "c": 0.75})
    assert [r.row for r in recording.token_citations()[0]] == [14, 4]
    memory.clear()
    assert recording.citations() == []
    assert recording.token_citations() == [[]]


def test_documents_of_ids_are_cited_in_runs_of_tokens():
    ids = [3 + n % 90 for n in range(70)]
    _, memory = remembering({"d": ids})
    citations = one_step(memory, {31: 0.1, 32: 0.2, 63: 0.3, 64: 0.4}).citations()
    runs = [(32, 64), (64, 70), (0, 32)]
    assert [c.text for c in citations] == [
        " ".join(f"w{token}" for token in ids[start:stop]) for start, stop in runs
    ]
    assert [c.share for c in citations] == pytest.approx([0.5, 0.4, 0.1])
    memory.tokenizer = None
    assert [c.text for c in one_step(memory, {31: 0.1}).citations()] == [""]


def test_documents_of_ids_are_quoted_in_whole_characters():
    text = "灯台守の猫は、霧の夜になると石段に座って鐘の音を待ちます。" * 3
    ids = byte_tokenizer()(text).input_ids  # three tokens a character; with <bos> and <eos>
    _, memory = remembering({"d": ids}, tokenizer=byte_tokenizer(), remove_special_ids=False)
    _, _, citations = cited_by_each_row(memory, "d")
    quotes = [citations[min(row + 16, len(ids) - 1)].text for row in range(0, len(ids), 32)]
    assert "".join(quotes) == text


# -- exact quotes -------------------------------------------------------------------------------

SENTENCES = {
    "First 😀 one. Family 👩\u200d👩\u200d👧 here! Flag 🇫🇷 🏳️\u200d🌈? End": [
        *("First 😀 one.", "Family 👩\u200d👩\u200d👧 here!", "Flag 🇫🇷 🏳️\u200d🌈?", "End"),
    ],
    "Cafe\u0301 one. Ångstro\u0308m two.\nसंस्कृत तीन.": [
        *("Cafe\u0301 one.", "Ångstro\u0308m two.", "संस्कृत तीन."),
    ],
    "One line.\r\nAnother\r\n\r\n\r\nThird one.\r\n": ["One line.", "Another", "Third one."],
    'He said "Go." She went. (Then what?) \u201cYes!\u201d he said. End.': [
        *('He said "Go."', "She went.", "(Then what?)", "\u201cYes!\u201d", "he said.", "End."),
    ],
    "彼は言った。「行け！」彼女は行った。終わり": [
        "彼は言った。",
        "「行け！」",
        "彼女は行った。",
        "終わり",
    ],
    "\n\n \n  First.\n \n\t\nSecond.   \n\n": ["First.", "Second."],
    "a\x00b.\x0b c.\x85d. e": ["a\x00b.", "c.", "d.", "e"],
    "just words with no end": ["just words with no end"],
    "𓀀𓀁. 𝒜𝒷!": ["𓀀𓀁.", "𝒜𝒷!"],
}


def cited_by_each_row(memory, name):
    """Let each row have a token of its own; return the document, sentences, and rows' citations."""
    document = memory.backend.catalog.document(name)
    num_rows = len(document.row_tokens)
    steps = ({2: ([[[document.first_row + row]]], [[[0.5]]])} for row in range(num_rows))
    citations = recorded(memory, *steps).citations(top=None)
    pairs = [(row, c) for c in citations for row, part in enumerate(c.token_attention) if part]
    assert sorted(row for row, _ in pairs) == [
        row for row in range(num_rows) if row not in document.sink_rows
    ]
    return document, sorted((c.start or 0, c.end or 0, c.text) for c in citations), dict(pairs)


@pytest.mark.parametrize("text", SENTENCES, ids=ascii)
def test_sentences_are_quoted_exactly(text):
    expected = ["Head", *SENTENCES[text]]
    text = "Head\n" + text  # the sinks are in the first line
    _, memory = remembering({"d": text}, tokenizer=byte_tokenizer())
    document, sentences, citations = cited_by_each_row(memory, "d")
    assert document.text == text
    for start, end, quote in sentences:
        assert text[start:end] == quote == quote.strip() != ""
        quote.encode()
    assert [quote for _, _, quote in sentences] == expected
    for row, citation in citations.items():  # each byte's row is cited by the sentence it is in
        start, end = document.offsets[document.row_tokens[row]]
        inside = text[start:end].strip()
        assert not inside or citation.start <= start < end <= citation.end


def test_special_tokens_do_not_stretch_a_quote():
    text = "Head of it.\nLast line."
    _, memory = remembering({"d": text}, tokenizer=byte_tokenizer(), remove_special_ids=False)
    document, sentences, citations = cited_by_each_row(memory, "d")
    assert document.token_ids[[0, -1]].tolist() == [1, 2]  # <bos> and <eos>
    assert [quote for _, _, quote in sentences] == ["Head of it.", "Last line."]
    assert citations[len(document.row_tokens) - 1].text == "Last line."


def test_rows_of_dropped_tokens_keep_the_others_in_place():
    text = "Head of it.\nSecond e line.\nThird."
    e = byte_tokenizer()("e").input_ids[1]
    _, memory = remembering({"d": text}, tokenizer=byte_tokenizer(), special_ids=[1, 2, e])
    document, _, citations = cited_by_each_row(memory, "d")
    assert len(document.row_tokens) == len(text) - text.count("e")
    for row, citation in citations.items():
        start = document.offsets[document.row_tokens[row], 0]
        assert citation.start <= start <= citation.end


@pytest.mark.parametrize(
    "sentence",
    [
        "word " * 200,
        "x" * 1000,
        "e\u0301" * 450,
        "👩\u200d👧" * 150,
        "a" + " " * 1000 + "b",
        " " * 900 + "b",
    ],
    ids=["words", "one word", "accents", "joined emoji", "spaces inside", "spaces before"],
)
def test_long_sentences_are_cut_between_characters(sentence):
    text = "Head\n" + sentence + " end"
    _, memory = remembering({"d": text}, tokenizer=byte_tokenizer())
    _, sentences, _ = cited_by_each_row(memory, "d")
    assert "".join("".join(quote.split()) for _, _, quote in sentences) == "".join(text.split())
    for start, end, quote in sentences:
        assert 0 < len(quote) <= 400
        assert text[start:end] == quote
        assert unicodedata.category(quote[0])[0] != "M"
        assert "\u200d" not in (quote[0], quote[-1])


# -- real recordings ----------------------------------------------------------------------------


def mass_by_loop(memory, recording, rows_of_step, said=None):
    """Sum weights with plain loops; return {(document, line): share} of documents of lines.

    With the ids of the tokens that were said, only weights of rows of the same token count.
    """
    mass = defaultdict(float)
    catalog = memory.backend.catalog
    documents = [catalog.document(name) for name in memory.documents]
    for number, (step, batch_row) in enumerate(zip(recording, rows_of_step, strict=True)):
        for retrieved in step.values():
            ids, weights = retrieved.ids[batch_row, :, 0], retrieved.weights[batch_row, :, 0]
            for row, weight in zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True):
                for document in documents:
                    inside = row - document.first_row
                    is_row = 0 <= inside < len(document.row_tokens)
                    if is_row and inside not in document.sink_rows.tolist():
                        token = document.row_tokens[inside]
                        if said is None or document.token_ids[token] == said[number]:
                            mass[line_of(document, token)] += weight
    total = sum(mass.values())
    return {key: value / total for key, value in mass.items()}


def line_of(document, token):
    number = document.text[: document.offsets[token, 0]].count("\n")
    return document.name, document.text.split("\n")[number]


def lines(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 97, (6, 5), generator=generator).tolist()
    return "\n".join(" ".join(f"w{token}" for token in line) for line in tokens)


@pytest.fixture
def real():
    return remembering({"a": lines(1), "b": lines(2)}, topk=6)


def test_shares_of_a_real_batch(real):
    model, memory = real
    prompts = torch.tensor([[5, 9, 33, 60], [41, 18, 77, 8]])
    with memory.recording() as recording:
        output = model.generate(prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    num_copied = 0
    for sequence in range(2):
        options = {"sequence": sequence, "layers": ALL_LAYERS, "top": None}
        citations = recording.citations(**options)
        expected = mass_by_loop(memory, recording, [sequence] * 5)
        assert {(c.document, c.text): c.share for c in citations} == pytest.approx(expected)
        copied = mass_by_loop(memory, recording, [sequence] * 5, output[sequence, 4:].tolist())
        num_copied += len(copied)
        assert {(c.document, c.text): c.copied for c in citations if c.copied} == pytest.approx(
            copied
        )
        order = [(c.copied, c.share) for c in citations]
        assert order == sorted(order, reverse=True)
        assert sum(c.share for c in citations) == pytest.approx(1)
        for at, token in enumerate(recording.token_citations(**options)):
            assert sum(row.share for row in token) == pytest.approx(1)
            shares = defaultdict(float)
            for row in token:
                document = memory.backend.catalog.document(row.document)
                assert document.row_tokens[row.row - document.first_row] == row.token
                shares[line_of(document, row.token)] += row.share
            assert shares == pytest.approx(mass_by_loop(memory, [recording[at]], [sequence]))
    assert num_copied


def test_beams_are_explained_by_the_queries_that_chose_their_tokens(real):
    model, memory = real
    prompt = torch.tensor([[5, 9, 33, 60]])
    with memory.recording() as recording:
        output = model.generate(
            prompt,
            max_new_tokens=6,
            min_new_tokens=6,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    assert len(set(map(tuple, output.beam_indices.tolist()))) > 1
    for sequence, beams in zip(output.sequences, output.beam_indices, strict=True):
        with memory.recording(whole_prompt=True) as again, torch.no_grad():
            model(sequence[None, :-1])
        replayed = [
            {
                idx: Retrieved(idx, *(getattr(layer, part)[:, :, at : at + 1] for part in PARTS))
                for idx, layer in again[0].items()
            }
            for at in range(prompt.shape[1] - 1, sequence.shape[0] - 1)
        ]
        expected = mass_by_loop(memory, replayed, [0] * 6)
        citations = recording.citations(beam_indices=beams, layers=ALL_LAYERS, top=None)
        shares = {(c.document, c.text): c.share for c in citations}
        assert shares == pytest.approx(expected, abs=1e-4)
        copied = {(c.document, c.text): c.copied for c in citations if c.copied}
        same = output.sequences[(output.beam_indices == beams).all(1)]  # of some, the last differs
        said = torch.where((same == sequence).all(0), sequence, -1)[prompt.shape[1] :].tolist()
        assert copied == pytest.approx(mass_by_loop(memory, replayed, [0] * 6, said), abs=1e-4)


@pytest.mark.parametrize("sinks", ["all", "one"])
def test_sinks_are_retrieved_and_not_cited(sinks):
    model, memory = remembering({"a": lines(1), "b": lines(2)}, topk=60, sinks=sinks)
    with memory.recording() as recording:
        model.generate(torch.tensor([[5, 9]]), max_new_tokens=2, do_sample=False)
    retrieved = set(recording[0][0].ids.flatten().tolist())
    assert {0, 1, 2} <= retrieved  # the tokens after <bos>
    assert ({30, 31, 32} <= retrieved) == (sinks == "all")
    cited = {row.row for token in recording.token_citations(top=None) for row in token}
    assert cited == set(range(60)) - {0, 1, 2, 30, 31, 32}
