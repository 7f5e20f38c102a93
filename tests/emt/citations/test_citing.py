"""Citations of recordings made by hand, with known weights; of real ones, against plain loops."""

import unicodedata
from collections import defaultdict

import torch
import pytest

from emt import MemoryConfig, attach
from emt.citations.citing import cite, cite_tokens, content_layers
from emt.citations.recording import Recording
from emt.errors import MemoryUseError
from emt.passage import Retrieved
from tests.emt.bytes import BYTES_VOCAB_SIZE, byte_tokenizer
from tests.emt.words import word_tokenizer
from tests.families import build

PARTS = ("ids", "scores", "weights")


def remembering(documents, tokenizer=None, **settings):
    """Attach a fresh model and write documents; token n of a text of words is row n - 1."""
    tokenizer = tokenizer or word_tokenizer()
    vocab_size = BYTES_VOCAB_SIZE if tokenizer.vocab_size == BYTES_VOCAB_SIZE else 97
    model = build("llama", vocab_size=vocab_size)
    memory = attach(model, MemoryConfig(**settings), tokenizer=tokenizer)
    for name, source in documents.items():
        memory.write(source, document=name)
    return model, memory


def recorded(*steps):
    """Make a recording of steps {layer: (ids, weights)}, each (B, H, 1, k) nested lists."""
    recording = Recording()
    for step in steps:
        for layer_idx, (ids, weights) in step.items():
            ids, weights = torch.tensor(ids), torch.tensor(weights, dtype=torch.float32)
            ids, weights = ids.view(*ids.shape[:2], 1, -1), weights.view(*ids.shape[:2], 1, -1)
            recording.add(Retrieved(layer_idx, ids, torch.ones(ids.shape), weights))
    return recording


def one_step(weights):
    """Make a recording of one token, layer and head from {row: weight}."""
    return recorded({0: ([[list(weights)]], [[list(weights.values())]])})


# -- by hand ------------------------------------------------------------------------------------


def test_shares_of_known_weights():
    # the first four tokens are attention sinks: rows 0 to 2 after <bos>, and rows 8 to 11
    _, memory = remembering({"a": "w3 w4 w5 w6 w7 w8\nw9 w10", "b": [11, 12, 13, 14, 15, 16]})
    assert memory.documents == ["a", "b"]
    recording = recorded(
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
    found = cite(memory, recording)
    assert [(c.document, c.start, c.end, c.text) for c in found] == [
        ("a", 18, 24, "w9 w10"),
        ("a", 0, 17, "w3 w4 w5 w6 w7 w8"),
        ("b", None, None, "w11 w12 w13 w14 w15 w16"),
    ]
    assert [c.share for c in found] == pytest.approx([0.5 / 1.1, 0.4 / 1.1, 0.2 / 1.1])
    assert sum(c.share for c in found) == pytest.approx(1)
    rows = cite_tokens(memory, recording)
    assert [[(r.row, r.document, r.token) for r in token] for token in rows] == [
        [(4, "a", 5), (6, "a", 7), (13, "b", 5)],
        [(7, "a", 8), (5, "a", 6)],
    ]
    assert [[r.share for r in token] for token in rows] == [
        pytest.approx([0.2 / 0.7, 0.2 / 0.7, 0.2 / 0.7]),
        pytest.approx([0.3 / 0.4, 0.1 / 0.4]),
    ]
    assert len(cite(memory, recording, top=1)) == 1
    assert [len(token) for token in cite_tokens(memory, recording, top=1)] == [1, 1]
    assert cite(memory, recording, top=0) == []


def test_only_the_first_tokens_if_asked():
    _, memory = remembering({"a": "w3 w4 w5 w6 w7\nw8"})
    recording = recorded(*({0: ([[[row]]], [[[0.5]]])} for row in (4, 5, 5)))
    shares = {
        num_tokens: [(c.text, c.share) for c in cite(memory, recording, num_tokens=num_tokens)]
        for num_tokens in (0, 1, 2, 9)
    }
    first, second = "w3 w4 w5 w6 w7", "w8"
    assert shares[0] == []
    assert shares[1] == [(first, 1)]
    assert shares[2] == [(first, 0.5), (second, 0.5)]
    assert shares[9] == [(second, pytest.approx(2 / 3)), (first, pytest.approx(1 / 3))]
    assert len(cite_tokens(memory, recording, num_tokens=2)) == 2


@pytest.mark.parametrize(
    "recording",
    [
        Recording(),
        one_step({0: 0.5, 2: 0.2}),
        one_step({4: 0.0, 5: 0.0}),
        one_step({-1: 0.0}),
    ],
    ids=["nothing", "sinks", "masked", "no rows"],
)
def test_without_mass_there_is_nothing_to_cite(recording):
    _, memory = remembering({"a": "w3 w4 w5 w6 w7 w8"})
    assert cite(memory, recording) == []
    assert cite_tokens(memory, recording) == [[] for _ in recording]


def test_sequences_of_a_batch_and_beams():
    _, memory = remembering({"a": "w3 w4 w5 w6 w7\nw8\nw9"})
    recording = recorded(
        {0: ([[[4]], [[5]], [[6]]], [[[0.5]]] * 3)},
        {0: ([[[5]], [[6]], [[4]]], [[[0.5]]] * 3)},
    )
    lines = {4: "w3 w4 w5 w6 w7", 5: "w8", 6: "w9"}
    for sequence, rows in enumerate(([4, 5], [5, 6], [6, 4])):
        found = cite(memory, recording, sequence=sequence)
        assert {c.text for c in found} == {lines[row] for row in rows}
        cited = cite_tokens(memory, recording, sequence=sequence)
        assert [[r.row for r in token] for token in cited] == [[row] for row in rows]
    beams = torch.tensor([2, 0, -1, -1])
    assert [r[0].row for r in cite_tokens(memory, recording, beam_indices=beams)] == [6, 5]
    assert [r[0].row for r in cite_tokens(memory, recording, beam_indices=[2])] == [6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": 1}, "sequence must be 0 to 0, the recorded batch; got 1"),
        ({"sequence": -1}, "sequence must be 0 to 0, the recorded batch; got -1"),
        ({"beam_indices": [3]}, "beam_indices must be 0 to 0, the recorded batch; got 3"),
        ({"num_tokens": -1}, "num_tokens must be at least 0; got -1"),
        ({"top": -1}, "top must be at least 0; got -1"),
    ],
)
@pytest.mark.parametrize("function", [cite, cite_tokens])
def test_wrong_numbers_are_refused(function, options, message):
    _, memory = remembering({"a": "w3 w4 w5 w6 w7"})
    with pytest.raises(MemoryUseError, match=message):
        function(memory, one_step({4: 0.5}), **options)


def test_what_was_removed_is_left_out_and_the_others_stay_who_they_are():
    _, memory = remembering({name: [5, 6, 7, 8, n] for n, name in enumerate("abc", start=20)})
    recording = one_step({4: 0.1, 9: 0.6, 14: 0.3})
    memory.remove("b")
    memory.write([5, 6, 7, 8, 30], document="b")  # another b, of rows 15 to 19
    assert {c.document: c.share for c in cite(memory, recording)} == pytest.approx(
        {"a": 0.25, "c": 0.75}
    )
    assert [r.row for r in cite_tokens(memory, recording)[0]] == [14, 4]
    memory.clear()
    assert cite(memory, recording) == []
    assert cite_tokens(memory, recording) == [[]]


def test_documents_of_ids_are_cited_in_runs_of_tokens():
    ids = [3 + n % 90 for n in range(70)]
    _, memory = remembering({"d": ids})
    found = cite(memory, one_step({31: 0.1, 32: 0.2, 63: 0.3, 64: 0.4}))
    runs = [(32, 64), (64, 70), (0, 32)]
    assert [c.text for c in found] == [
        " ".join(f"w{token}" for token in ids[start:stop]) for start, stop in runs
    ]
    assert [c.share for c in found] == pytest.approx([0.5, 0.4, 0.1])
    memory.tokenizer = None
    assert [c.text for c in cite(memory, one_step({31: 0.1}))] == [""]


# -- exact quotes -------------------------------------------------------------------------------

TEXTS = {
    "emoji": "First 😀 one. Family 👩\u200d👩\u200d👧 here! Flag 🇫🇷 🏳️\u200d🌈? End",
    "combining": "Cafe\u0301 one. Ångstro\u0308m two.\nसंस्कृत तीन.",
    "CRLF": "One line.\r\nAnother\r\n\r\n\r\nThird one.\r\n",
    "quotes": 'He said "Go." She went. (Then what?) \u201cYes!\u201d he said. End.',
    "CJK": "彼は言った。「行け！」彼女は行った。終わり",
    "blank lines": "\n\n \n  First.\n \n\t\nSecond.   \n\n",
    "NUL and controls": "a\x00b.\x0b c.\x85d. e",
    "no end": "just words with no end",
    "astral": "𓀀𓀁. 𝒜𝒷!",
}
SENTENCES = {
    "emoji": ["First 😀 one.", "Family 👩\u200d👩\u200d👧 here!", "Flag 🇫🇷 🏳️\u200d🌈?", "End"],
    "combining": ["Cafe\u0301 one.", "Ångstro\u0308m two.", "संस्कृत तीन."],
    "CRLF": ["One line.", "Another", "Third one."],
    "quotes": [
        'He said "Go."',
        "She went.",
        "(Then what?)",
        "\u201cYes!\u201d",
        "he said.",
        "End.",
    ],
    "CJK": ["彼は言った。", "「行け！」", "彼女は行った。", "終わり"],
    "blank lines": ["First.", "Second."],
    "NUL and controls": ["a\x00b.", "c.", "d.", "e"],
    "no end": ["just words with no end"],
    "astral": ["𓀀𓀁.", "𝒜𝒷!"],
}


def passages_row_by_row(memory, name):
    """Cite each row of a document alone; return its passages in order and each row's own."""
    document = memory.backend.catalog.document(name)
    rows = {}
    for at in range(len(document.row_tokens)):
        found = cite(memory, one_step({document.first_row + at: 0.5}))
        if at in document.sink_rows:
            assert found == []
        else:
            assert len(found) == 1
            rows[at] = found[0]
    return document, sorted({(c.start, c.end, c.text) for c in rows.values()}), rows


@pytest.mark.parametrize("name", TEXTS)
def test_sentences_are_quoted_exactly(name):
    text = "Head\n" + TEXTS[name]  # the sinks are in the first line
    _, memory = remembering({"d": text}, byte_tokenizer())
    document, passages, rows = passages_row_by_row(memory, "d")
    assert document.text == text
    for start, end, quoted in passages:
        assert text[start:end] == quoted == quoted.strip() != ""
        quoted.encode()
    assert [quoted for _, _, quoted in passages] == ["Head", *SENTENCES[name]]
    for at, citation in rows.items():  # each byte's row is cited by the sentence it is in
        start, end = document.offsets[document.row_tokens[at]]
        inside = text[start:end].strip()
        assert not inside or citation.start <= start < end <= citation.end


def test_special_tokens_do_not_stretch_a_quote():
    text = "Head of it.\nLast line."
    _, memory = remembering({"d": text}, byte_tokenizer(), remove_special_ids=False)
    document, passages, rows = passages_row_by_row(memory, "d")
    assert document.token_ids[[0, -1]].tolist() == [1, 2]  # <bos> and <eos>
    assert [quoted for _, _, quoted in passages] == ["Head of it.", "Last line."]
    assert rows[len(document.row_tokens) - 1].text == "Last line."


def test_rows_of_dropped_tokens_keep_the_others_in_place():
    text = "Head of it.\nSecond e line.\nThird."
    e = byte_tokenizer()("e").input_ids[1]
    _, memory = remembering({"d": text}, byte_tokenizer(), special_ids=[1, 2, e])
    document, _, rows = passages_row_by_row(memory, "d")
    assert len(document.row_tokens) == len(text) - text.count("e")
    for at, citation in rows.items():
        start = document.offsets[document.row_tokens[at], 0]
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
    _, memory = remembering({"d": text}, byte_tokenizer())
    _, passages, _ = passages_row_by_row(memory, "d")
    assert "".join("".join(quoted.split()) for _, _, quoted in passages) == "".join(text.split())
    for start, end, quoted in passages:
        assert 0 < len(quoted) <= 400
        assert text[start:end] == quoted
        assert unicodedata.category(quoted[0])[0] != "M"
        assert "\u200d" not in (quoted[0], quoted[-1])


# -- real recordings ----------------------------------------------------------------------------


def share_by_loop(memory, recording, rows_of_step):
    """Sum weights with plain loops; return {(document, line): share} of documents of lines."""
    mass = defaultdict(float)
    catalog = memory.backend.catalog
    documents = [catalog.document(name) for name in memory.documents]
    for step, batch_row in zip(recording, rows_of_step, strict=True):
        for retrieved in step.values():
            for head in range(retrieved.ids.shape[1]):
                for at in range(retrieved.ids.shape[3]):
                    row = int(retrieved.ids[batch_row, head, 0, at])
                    weight = float(retrieved.weights[batch_row, head, 0, at])
                    for document in documents:
                        inside = row - document.first_row
                        if not 0 <= inside < len(document.row_tokens):
                            continue
                        if inside in document.sink_rows.tolist():
                            continue
                        character = document.offsets[document.row_tokens[inside], 0]
                        line = document.text[:character].count("\n")
                        mass[document.name, document.text.split("\n")[line]] += weight
    total = sum(mass.values())
    return {key: value / total for key, value in mass.items()}


def texts(seed):
    generator = torch.Generator().manual_seed(seed)
    lines = torch.randint(3, 97, (6, 5), generator=generator).tolist()
    return "\n".join(" ".join(f"w{token}" for token in line) for line in lines)


@pytest.fixture
def real():
    return remembering({"a": texts(1), "b": texts(2)}, topk=6)


def test_shares_of_a_real_batch(real):
    model, memory = real
    prompts = torch.tensor([[5, 9, 33, 60], [41, 18, 77, 8]])
    with memory.recording() as recording:
        model.generate(prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for sequence in range(2):
        found = cite(memory, recording, sequence=sequence, top=1000)
        expected = share_by_loop(memory, recording, [sequence] * 5)
        assert {(c.document, c.text): c.share for c in found} == pytest.approx(expected)
        assert [c.share for c in found] == sorted(expected.values(), reverse=True)
        assert sum(c.share for c in found) == pytest.approx(1)
        tokens = cite_tokens(memory, recording, sequence=sequence, top=1000)
        assert [sum(r.share for r in token) for token in tokens] == pytest.approx([1] * 5)
        for at, token in enumerate(tokens):
            lines = defaultdict(float)
            for row in token:
                document = memory.backend.catalog.document(row.document)
                assert document.row_tokens[row.row - document.first_row] == row.token
                line = document.text[: document.offsets[row.token, 0]].count("\n")
                lines[row.document, document.text.split("\n")[line]] += row.share
            alone = share_by_loop(memory, [recording[at]], [sequence])
            assert lines == pytest.approx(alone)


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
        whole = again[0]
        replayed = [
            {
                idx: Retrieved(idx, *(getattr(found, part)[:, :, at : at + 1] for part in PARTS))
                for idx, found in whole.items()
            }
            for at in range(prompt.shape[1] - 1, sequence.shape[0] - 1)
        ]
        expected = share_by_loop(memory, replayed, [0] * 6)
        found = cite(memory, recording, beam_indices=beams, top=1000)
        assert {(c.document, c.text): c.share for c in found} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sinks", ["all", "one"])
def test_sinks_are_retrieved_and_not_cited(sinks):
    model, memory = remembering({"a": texts(1), "b": texts(2)}, topk=60, sinks=sinks)
    with memory.recording() as recording:
        model.generate(torch.tensor([[5, 9]]), max_new_tokens=2, do_sample=False)
    seen = set(recording[0][0].ids.flatten().tolist())
    assert {0, 1, 2} <= seen  # the tokens after <bos>
    assert ({30, 31, 32} <= seen) == (sinks == "all")
    cited = {r.row for token in cite_tokens(memory, recording, top=100) for r in token}
    assert cited == set(range(60)) - {0, 1, 2, 30, 31, 32}


def test_only_the_named_layers_count():
    _, memory = remembering({"a": list(range(10, 18)), "b": list(range(20, 28))})
    weights = [[[0.2]]]
    recording = recorded({0: ([[[5]]], weights), 1: ([[[13]]], weights), 2: ([[[14]]], weights)})
    shares = {c.document: c.share for c in cite(memory, recording)}
    assert shares == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert [(c.document, c.share) for c in cite(memory, recording, layers=[0])] == [("a", 1.0)]
    assert content_layers(memory) == [1, 2]
    upper = cite_tokens(memory, recording, layers=content_layers(memory))
    assert [(row.row, row.share) for row in upper[0]] == [(13, 0.5), (14, 0.5)]
