"""Each rule of replacement, on sentences made for it."""

import random
from decimal import Decimal
from itertools import islice

import pytest
from experiments.builder.edits import Rejected, apply
from experiments.builder.kinds import kind_of
from experiments.builder.names import NameChange
from experiments.builder.numerals import numbers_in
from experiments.builder.quantities import (
    Date,
    DateChange,
    DecadeChange,
    NumberChange,
    other_numbers,
    other_years,
)


def changed(change, text):
    return apply(text, change.edits(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Pons is in Poitou; it corresponds to Pons.",
            "Cognac is in Poitou; it corresponds to Cognac.",
        ),
        ("PONS, Pons's and Pons\u2019 walls", "COGNAC, Cognac's and Cognac\u2019 walls"),
        ("Pons-born, (Pons)", "Cognac-born, (Cognac)"),
    ],
)
def test_a_name_is_replaced_as_a_whole_word(text, expected):
    assert changed(NameChange("Pons", "Cognac"), text) == expected


def test_plurals_follow_and_accents_do_not_hide():
    assert (
        changed(NameChange("Temüjin", "Sorghan"), "Temujin, two Temüjins")
        == "Sorghan, two Sorghans"
    )


def test_a_name_with_characters_of_regular_expressions():
    text = "The C++ (1998) of Yahoo! is not Coo (1998)."
    assert changed(NameChange("C++ (1998)", "Ada"), text) == "The Ada of Yahoo! is not Coo (1998)."


def test_a_person_is_also_known_by_surname_and_initial():
    change = NameChange("Charles Brenton Huggins", "Paul Samuelson", is_person=True)
    text = (
        "Charles Brenton Huggins, Dr. Huggins, C. Huggins and Charles Huggins; HUGGINS; Huggins's."
    )
    assert changed(change, text) == (
        "Paul Samuelson, Dr. Samuelson, Paul Samuelson and Paul Samuelson; SAMUELSON; Samuelson's."
    )


def test_a_surname_that_others_have_too_is_refused():
    change = NameChange("Robert Koch", "Paul Samuelson", is_person=True)
    with pytest.raises(Rejected, match="surname of others"):
        change.edits("Robert Koch met Erich Koch.")


def test_a_name_within_a_longer_name_is_refused():
    with pytest.raises(Rejected, match="longer name"):
        NameChange("York", "Leeds").edits("She moved from York to New York.")
    with pytest.raises(Rejected, match="longer name"):
        NameChange("Chicago", "Leeds").edits("The Chicago Tribune.")


def test_a_word_that_only_looks_like_the_name_is_refused():
    with pytest.raises(Rejected, match="ordinary word"):
        NameChange("Joy", "Baker").edits("The Joy motion was a joy.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000 vs 1000 and one thousand", "2,300 vs 2300 and 2.3 thousand"),
        ("1000.5, 11000, A1000, 1000s, 10:1000", "1000.5, 11000, A1000, 1000s, 10:1000"),
        ("$1000 (1000%)", "$2300 (2300%)"),
    ],
)
def test_numbers_are_found_by_value_and_keep_their_form(text, expected):
    assert changed(NumberChange(((Decimal(1000), Decimal(2300)),)), text) == expected


def test_number_words_are_found_by_value():
    change = NumberChange(((Decimal(23), Decimal(31)),))
    text = "Twenty-three, twenty three, 23; not 123 or twenty or the 23rd."
    expected = "Thirty-one, thirty-one, 31; not 123 or twenty or the 23rd."
    assert changed(change, text) == expected


def test_ordinals_are_apart_from_numbers():
    change = NumberChange(((Decimal(19), Decimal(22)),), ordinal=True)
    assert changed(change, "the 19th, nineteenth, 19") == "the 22nd, twenty-second, 19"


def test_a_decade_is_not_its_first_year():
    text = "the 1990s, in 1990, the late 1990's"
    assert changed(DecadeChange("1990", "1960"), text) == "the 1960s, in 1990, the late 1960's"
    assert numbers_in("the 1990s") == ()


def test_a_date_in_every_order_but_not_of_other_years():
    change = DateChange(Date(15, "May", "1525"), Date(3, "June", "1525"))
    text = "15 May 1525; May 15, 1525; on May 15th; 15 May 1530; May 1525; 15 men"
    expected = "3 June 1525; June 3, 1525; on June 3th; 15 May 1530; May 1525; 15 men"
    assert changed(change, text) == expected.replace("3th", "3rd")


@pytest.mark.parametrize("text", ["45,000", "8.5", "76", "6.25", "1,200", "3 million", "sixteen"])
def test_new_numbers_look_like_the_old(text):
    (old,) = numbers_in(text)
    found = list(islice(other_numbers(old, random.Random(0), None), 50))
    assert len(found) == 50
    for change in found:
        (new,) = numbers_in(changed(change, text))
        assert new.value != old.value
        assert old.value / 2 <= new.value <= old.value * Decimal("2.5")
        assert new.decimals == old.decimals
        assert new.is_word == old.is_word
        assert new.separator == old.separator
        assert len(new.text) == len(old.text) or old.is_word


def test_new_years_are_years_near_by_and_spans_keep_their_length():
    first, last = numbers_in("1756\u20131763")
    for change in islice(other_years([first, last], random.Random(0)), 50):
        (_, start), (_, stop) = change.values
        assert stop - start == 7
        assert 2 <= abs(start - 1756) <= 30


@pytest.mark.parametrize(
    ("question", "answer", "kind", "type"),
    [
        ("When was it issued?", "1967", "year", "year"),
        ("How many plates are there?", "1967", "number", "quantity"),
        ("When was the war?", "1756\u20131763", "year", "span of years"),
        ("When was the battle?", "15 May 1525", "number", "date"),
        ("When did riots start?", "late 1980s", "number", "decade"),
        ("To what century did it belong?", "19th", "number", "century"),
        ("What percent voted?", "45%", "number", "percent"),
        ("Who met him?", "Robert Koch", "entity", "person"),
        ("Who met him?", "William the Silent", "entity", "person, styled"),
        ("Who met him?", "King Henry IV", "entity", "king ..."),
        ("Which country is it?", "Norway", "entity", "country"),
        ("Where is it?", "Lake Baikal", "entity", "lake ..."),
        ("In what French town was he born?", "Pons", "entity", "city"),
    ],
)
def test_kinds_of_answers(question, answer, kind, type):
    found = kind_of(question, answer)
    assert (found.kind, found.type) == (kind, type)


@pytest.mark.parametrize(
    "answer", ["photosynthesis", "two or 3", "A696", "1795/6", "first", "the Mongols and Turks"]
)
def test_answers_without_a_type(answer):
    assert kind_of("Who or what was it?", answer) is None
