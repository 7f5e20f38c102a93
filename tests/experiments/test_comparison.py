"""The comparison: what is put before a question, and what is kept of its answer."""

import contextlib

import pytest
from experiments.comparison.run import run_comparison
from experiments.responder import LocalModel

from emt import MemoryConfig, attach, detach
from emt.errors import ConfigError
from tests.experiments.question_sets import (
    NAMES,
    WORDS,
    asking_about,
    comparison,
    documents_of_words,
    loaded_model,
    unanswerable,
    write_set,
)

AT = (20, 50)
TEMPLATE = "{question}\nAnswer in a few words."


@pytest.fixture
def world(tmp_path):
    """Return the model, its memory's settings and the folder of a set about three documents."""
    loaded, memory = loaded_model(tmp_path)
    questions = [asking_about(name, at) for name in NAMES for at in AT]
    questions.append(unanswerable())
    return loaded, memory, write_set(tmp_path / "words", questions, documents_of_words())


def run(settings, loaded, folder):
    return run_comparison(settings, folder, lambda: loaded).items


def by_id(items, condition):
    return {one["id"]: one for one in items.values() if one["condition"] == condition}


@contextlib.contextmanager
def remembered(loaded, **settings):
    """Attach a memory of the three documents, written apart from the experiment."""
    memory = attach(loaded.model, MemoryConfig(**settings), tokenizer=loaded.tokenizer)
    memory.write_all([(name, " ".join(words)) for name, words in WORDS.items()])
    try:
        yield memory
    finally:
        detach(loaded.model)
        memory.close()


def test_passages_are_found_if_their_rows_have_the_evidence(world, tmp_path):
    loaded, settings, folder = world
    settings = {**settings, "candidates": 0}  # a random model finds no question likely
    names = ["passages_heads", "passages_words"]
    asked = comparison([folder], settings, conditions=names, generate=False)
    items = run(asked, loaded, tmp_path / "out")
    assert len(items) == 2 * 7
    outcomes = set()
    for condition, routing in zip(names, ("heads", "words"), strict=True):
        records = by_id(items, condition)
        with remembered(loaded, mode="passage", routing=routing, **settings) as memory:
            for name in NAMES:
                for at in AT:
                    question = " ".join(WORDS[name][at - 3 : at + 4])
                    routed = memory.route(f"{TEMPLATE.format(question=question)}\nAnswer:")
                    passages = [part.passage for part in routed.passages]
                    rows = {
                        row
                        for p in passages
                        if p.document == name
                        for row in range(p.first, p.stop)
                    }  # a row is a word
                    record = records[f"{name}-{at}"]
                    assert record["found"] == (rows >= set(range(at, at + 6)))
                    assert record["first_document"] == (passages[0].document == name)
                    assert record["recalled"] == sum(p.stop - p.first for p in passages)
                    assert record["is_relevant"]
                    outcomes.add(record["found"])
        assert records["none"]["is_relevant"]
        assert records["none"]["found"] is None
    assert any(outcomes)  # else the answers would tell nothing


def test_chunks_are_found_if_they_have_the_evidence(world, tmp_path):
    loaded, settings, folder = world
    asked = comparison([folder], settings, conditions=["rag_bm25"], generate=False, chunks=2)
    records = by_id(run(asked, loaded, tmp_path / "out"), "rag_bm25")
    assert set(records) == {f"{name}-{at}" for name in NAMES for at in AT}  # none can be told
    # words 20 to 25 end in the chunk of 24 to 31; 50 to 55 are all in that of 48 to 55
    for name in NAMES:
        words = WORDS[name]
        question = set(words[47:54])
        best = max(
            ((other, at) for other in NAMES for at in range(0, 80, 8)),
            key=lambda place: len(question & set(WORDS[place[0]][place[1] : place[1] + 8])),
        )
        record = records[f"{name}-50"]
        if best == (name, 48):
            assert record["found"]
        assert record["recalled"] == 16


def test_a_chunk_that_does_not_fit_is_not_found(world, tmp_path):
    loaded, settings, _ = world
    first, second = asking_about("one", 16), asking_about("two", 48)
    question = {**first, "question": f"{first['question']} {second['question']}"}
    question["evidence"] += second["evidence"]
    folder = write_set(tmp_path / "both", [question], documents_of_words())
    asked = {"conditions": ["rag_bm25"], "generate": False, "chunks": 30}
    (every,) = run(comparison([folder], settings, **asked), loaded, tmp_path / "all").values()
    assert (every["found"], every["recalled"]) == (True, 240)
    narrow = comparison([folder], settings, **asked, window=21 + 8 + 4)  # one chunk, and the answer
    (record,) = run(narrow, loaded, tmp_path / "narrow").values()
    assert (record["found"], record["recalled"]) == (False, 8)


def test_two_pieces_of_evidence_are_needed_both(world, tmp_path):
    loaded, settings, _ = world
    settings = {**settings, "candidates": 0}
    question = asking_about("one", 20)
    question["evidence"] += asking_about("two", 50)["evidence"]
    folder = write_set(tmp_path / "two", [question], documents_of_words())
    asked = comparison(
        [folder], settings, conditions=["passages_words", "evidence", "document"], generate=False
    )
    items = run(asked, loaded, tmp_path / "out")
    passages, evidence, document = items.values()
    assert (passages["found"], passages["found_any"]) == (False, True)
    assert evidence["found"]
    assert document["found"]
    assert (evidence["recalled"], document["recalled"]) == (12, 160)


@pytest.mark.parametrize("at", [3, 30, 74])
def test_a_long_document_is_cut_around_the_evidence(world, tmp_path, at):
    loaded, settings, _ = world
    folder = write_set(tmp_path / "long", [asking_about("one", at)], documents_of_words())
    asked = {"conditions": ["document"], "generate": False, "document_tokens": 20}
    (record,) = run(comparison([folder], settings, **asked), loaded, tmp_path / "out").values()
    assert (record["found"], record["recalled"]) == (True, 20)


def test_answers_are_scored_as_the_model_gives_them(world, tmp_path):
    loaded, settings, _ = world
    question = asking_about("two", 50, original="w9", answers=["w4 w5", "w6"])
    folder = write_set(tmp_path / "scored", [question], documents_of_words())
    names = ["closed_book", "evidence", "passages_heads", "passages_and_tokens", "tokens"]
    exact = {**settings, "row_codec": "exact"}
    items = run(comparison([folder], exact, conditions=names), loaded, tmp_path / "out")
    by = {one["condition"]: one for one in items.values()}
    responder = LocalModel(loaded.model, loaded.tokenizer, max_new_tokens=4)
    message = TEMPLATE.format(question=question["question"])
    candidates = ["w4 w5", "w9"]
    expected = {
        "closed_book": responder.respond(message, candidates),
        "evidence": responder.respond(
            f"{question['evidence'][0]['text']}\n\n{message}", candidates
        ),
    }
    with remembered(loaded, mode="passage", routing="heads", **settings) as memory:
        expected["passages_heads"] = responder.respond(message, candidates)
    with remembered(loaded, mode="token", **settings) as memory:
        routed = memory.route(responder.prompt_ids(message))
        passages = [part.passage for part in reversed(routed.passages)]
        with memory.recalling(passages, at=routed.question.at, retrieve=True):
            expected["passages_and_tokens"] = responder.respond(message, candidates)
    with remembered(loaded, mode="token", topk=4, sinks="one") as memory:
        expected["tokens"] = responder.respond(message, candidates)
    for name, response in expected.items():
        assert by[name]["text"] == response.text, name
        assert by[name]["log_prob"] == pytest.approx(response.log_probs[0], abs=1e-4)
        assert by[name]["preferred"] == (response.log_probs[0] > response.log_probs[1])
        assert by[name]["right"] == ("w4 w5" in response.text or "w6" in response.text)
    assert len({round(by[name]["log_prob"], 3) for name in names}) == len(names)


def test_rows_that_are_read_again_answer_as_kept_ones(world, tmp_path):
    """They are read for the answer once more, so that the time of the first token has it in."""
    loaded, settings, _ = world
    folder = write_set(tmp_path / "text", [asking_about("two", 50)], documents_of_words())
    names = ["passages_heads", "passages_text"]
    settings = {**settings, "routing": "heads", "reread_context": 10**6}
    asked = comparison([folder], settings, conditions=names)
    kept, text = run(asked, loaded, tmp_path / "out").values()
    assert text["bytes_per_token"] < kept["bytes_per_token"]
    for key in ("text", "found", "recalled", "right"):
        assert text[key] == kept[key]
    assert text["log_prob"] == pytest.approx(kept["log_prob"], abs=1e-3)


def test_a_right_answer_s_first_citation_is_judged(world, tmp_path):
    loaded, settings, _ = world
    with remembered(loaded, mode="passage", routing="heads", **settings) as memory:
        responder = LocalModel(loaded.model, loaded.tokenizer, max_new_tokens=4)
        message = TEMPLATE.format(question=asking_about("one", 20)["question"])
        with memory.recording() as recording:
            said = responder.respond(message).text
        cited = recording.citations("passage", top=1)[0]
    start = len(" ".join(WORDS[cited.document]).split(cited.text)[0].split())
    inside = asking_about(cited.document, start + 3, answers=[said])
    inside |= {"question": asking_about("one", 20)["question"], "id": "inside"}
    outside = {**inside, "id": "outside"}
    outside["evidence"] = [
        {
            "document": cited.document,
            "text": " ".join(WORDS[cited.document][(start + 40) % 74 :][:6]),
        }
    ]
    folder = write_set(tmp_path / "cited", [inside, outside], documents_of_words())
    asked = comparison([folder], settings, conditions=["passages_heads"])
    records = by_id(run(asked, loaded, tmp_path / "out"), "passages_heads")
    assert records["inside"]["right"]
    assert (records["inside"]["is_cited"], records["outside"]["is_cited"]) == (True, False)


def test_a_condition_on_metadata_holds_for_passages_and_chunks(world, tmp_path):
    loaded, settings, _ = world
    question = asking_about("one", 20, where={"year": [2001, 2002]})  # "one" is of 2000
    folder = write_set(tmp_path / "where", [question], documents_of_words())
    names = ["passages_words", "passages_heads", "rag_bm25"]
    items = run(comparison([folder], settings, conditions=names, generate=False), loaded, tmp_path)
    assert [one["found_any"] for one in items.values()] == [False] * 3
    assert [one["first_document"] for one in items.values()] == [False] * 3
    assert all(one["recalled"] for one in items.values())


def test_without_their_documents_questions_should_find_nothing(world, tmp_path):
    loaded, settings, folder = world
    names = ["passages_heads", "rag_bm25"]
    every = {"conditions": names, "generate": False, "without_documents": True, "limit": 2}
    for relevance, told in ((None, False), (1e6, True)):
        asked = comparison([folder], {**settings, "relevance": relevance}, **every)
        items = run(asked, loaded, tmp_path / str(relevance))
        for one in by_id(items, "passages_heads").values():
            assert one["told_without_document"] == (told if one["has_answer"] else None)
            assert one["is_relevant"] != told
        assert {one["told_without_document"] for one in by_id(items, "rag_bm25").values()} == {None}


def test_it_goes_on_with_more_questions_and_conditions(world, tmp_path):
    loaded, settings, folder = world
    few = comparison([folder], settings, generate=False, limit=2)
    first = run(few, loaded, tmp_path / "out")
    (store,) = (tmp_path / "out" / "stores").iterdir()
    rows = store / "rows"
    before = {path: path.stat().st_mtime_ns for path in rows.iterdir()}
    names = ["passages_heads", "passages_words", "rag_bm25"]
    more = comparison([folder], settings, generate=False, limit=4, conditions=names)
    items = run(more, loaded, tmp_path / "out")
    assert {key: items[key] for key in first} == first
    assert len(by_id(items, "passages_heads")) == 4
    assert {path: path.stat().st_mtime_ns for path in rows.iterdir()} == before  # not read again
    assert len(run(more, loaded, tmp_path / "out")) == len(items)


def test_what_was_asked_otherwise_is_refused(world, tmp_path):
    loaded, settings, folder = world
    asked = {"generate": False, "limit": 1}
    run(comparison([folder], settings, **asked), loaded, tmp_path / "out")
    other = {"passages_heads": {"mode": "passage", "memory": {"routing": "words"}}}
    with pytest.raises(ConfigError, match="under a condition of other settings"):
        run(comparison([folder], settings, conditions=other, **asked), loaded, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"chunk_tokens 8 \(now 9\)"):
        run(comparison([folder], settings, chunk_tokens=9, **asked), loaded, tmp_path / "out")
    with pytest.raises(ConfigError, match="words comes twice"):
        run(comparison([folder, folder], settings), loaded, tmp_path / "twice")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conditions": ["rag_dense"]}, "'rag_dense' needs an embedding_model"),
        ({"conditions": ["rag"]}, "unknown condition 'rag'. The conditions are closed_book"),
        ({"conditions": {"x": {"prompt": "chunks"}}}, "a retriever belongs to the prompt 'chunks'"),
        ({"conditions": {"x": {"memory": {"topk": 3}}}}, "settings of a memory need a mode"),
        ({"conditions": {"x": {"mode": "tokens"}}}, "conditions.x: mode: Input should be"),
        ({"sets": []}, "sets: List should have at least 1 item"),
        ({"memory": {"path": "x"}}, "'path' cannot be set"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError) as caught:
        comparison(**{"sets": ["words"], "memory": {}, **changes})
    assert said in str(caught.value)
