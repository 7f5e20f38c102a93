import json
import os
from pathlib import Path

import pytest
from experiments.items import Item, load_items
from experiments.paraphrases import (
    answer_sentences,
    content_words,
    mean_shared_words,
    paraphrased,
    shared_words,
)

from emt.errors import DocumentError

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "configs" / "experiments" / "data" / "paraphrases.jsonl"
DATA = Path(os.environ.get("EMT_DATA", ROOT.parent / "shared" / "data"))  # not in the repository
DEVELOPMENT = DATA / "counterfactual" / "dev.jsonl"

CONTEXT = (
    "Normans\n\n"
    "The Normans signed a treaty in Leeds. It rained on the U.S. envoys.[note] "
    "Envoys of the king, St. John among them, left LEEDS by ship.:33 Leedsmen waved!"
)


def item(question, *, name="a", context=CONTEXT, answer="Leeds"):
    return Item(name, "Normans", "2k", context, question, answer)


def row(name="a", question="In what town was peace made?", original="Where was it signed?"):
    return {"id": name, "question": question, "original": original}


def write(folder, *rows):
    path = folder / "questions.jsonl"
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(items, path):
    with pytest.raises(DocumentError) as caught:
        paraphrased(items, path)
    return str(caught.value)


def test_items_are_asked_in_other_words_in_their_order_and_others_left_out(tmp_path):
    items = [item("Who?", name="c"), item("Why?", name="b"), item("Where was it signed?")]
    path = write(tmp_path, row(), "", row("c", "Which person?", "Who?"))
    found = paraphrased(items, path)
    assert [(one.id, one.question) for one in found] == [
        ("c", "Which person?"),
        ("a", "In what town was peace made?"),
    ]
    assert (found[1].context, found[1].answer) == (CONTEXT, "Leeds")
    assert items[2].question == "Where was it signed?"


def test_an_id_that_no_item_has_is_named(tmp_path):
    path = write(tmp_path, row(), row("z"))
    assert refusal([item("Where was it signed?")], path) == (
        f"'{path}' line 2: expected the id of one of the 1 items; got 'z'. "
        "Give the items that the file was written for, all of them."
    )


def test_an_item_that_asks_something_else_is_named(tmp_path):
    path = write(tmp_path, row())
    assert refusal([item("Who signed it?")], path) == (
        f"'{path}' line 1: expected the question of item 'a', 'Who signed it?', as 'original'; "
        "got 'Where was it signed?'. Write the question in other words anew, or give the items "
        "it was written for."
    )


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("{", "line 2 is not JSON: Expecting property name"),
        ("[1]", "line 2: expected an object with id, question, original, each text; got [1]."),
        ({**row("b"), "question": " "}, "line 2: expected an object with id, question, original"),
        ({"id": "b", "question": "Who?"}, "line 2: expected an object with id, question, original"),
        (row(), "line 2: id 'a' is there already. Leave one out."),
    ],
)
def test_a_bad_row_is_named(tmp_path, second, said):
    assert said in refusal([item("Where was it signed?")], write(tmp_path, row(), second))


def test_a_file_that_is_missing_or_has_no_rows_is_named(tmp_path):
    missing = tmp_path / "none.jsonl"
    said = f"questions '{missing}' cannot be read: No such file or directory."
    assert refusal([item("Who?")], missing) == said
    path = write(tmp_path, "", " ")
    assert refusal([item("Who?")], path).startswith(f"'{path}' has no questions. Each must be an")


def test_the_sentences_of_an_answer_are_those_that_hold_it_as_whole_words():
    assert answer_sentences(item("?")) == [
        "The Normans signed a treaty in Leeds.",
        "Envoys of the king, St. John among them, left LEEDS by ship.:33",
    ]
    assert answer_sentences(item("?", answer="U.S. envoys")) == [
        "It rained on the U.S. envoys.[note]"
    ]
    assert answer_sentences(
        item("?", context="He met Mr. Hull. Then Leeds.", answer="Mr. Hull")
    ) == [
        "He met Mr.",
        "Hull.",
    ]


def test_function_words_case_and_accents_are_no_content():
    words = content_words("Which ÉTUDE did the north-west hear in 1,128 cities, which étude?")
    assert words == ["etude", "north", "west", "hear", "1", "128", "cities"]


@pytest.mark.parametrize(
    ("question", "shared"),
    [
        ("Where did the Norman sign the treaties?", ["norman", "sign", "treaties"]),
        ("Where were kings on ships?", ["kings", "ships"]),
        ("In what town did the knights agree on peace?", []),
        ("Did it rain after Johan left?", ["left"]),  # rain: in a sentence without the answer
        ("Are signals signals?", ["signals"]),  # by chance, once
        ("Is a kin in a shipyard?", ["shipyard"]),  # three letters must be the whole word
    ],
)
def test_words_are_shared_with_all_sentences_of_the_answer_whatever_their_form(question, shared):
    assert shared_words(item(question)) == shared


def test_the_mean_is_over_questions():
    items = [item("Who signed the treaty?"), item("Why peace?")]
    assert mean_shared_words(items) == 1.0
    with pytest.raises(ValueError, match="at least one item; got none"):
        mean_shared_words([])


def test_the_shipped_questions_differ_from_the_originals_in_their_words():
    rows = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    items = [
        item(row["original"], name=row["id"], context=row["original"], answer=row["original"])
        for row in rows
    ]
    found = paraphrased(items, SHIPPED)
    assert len(found) == len({one.question for one in found}) == 54
    # Each original is its own document here: one left as it was would share every word of it.
    assert mean_shared_words(found) < 0.5
    assert all(one.question.endswith("?") for one in found)


@pytest.mark.skipif(not DEVELOPMENT.exists(), reason="the development set is not here")
def test_the_shipped_questions_share_no_word_with_the_sentences_of_their_answers():
    items = load_items(DEVELOPMENT)
    found = paraphrased(items, SHIPPED)
    asked = {one.id for one in found}
    originals = [one for one in items if one.id in asked]
    assert {one.id: shared_words(one) for one in found if shared_words(one)} == {}
    assert mean_shared_words(originals) > 4
