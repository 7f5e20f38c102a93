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


PONS = NameChange("Pons", "Cognac")
HUGGINS = NameChange("Charles Brenton Huggins", "Paul Samuelson", is_person=True)
THOUSAND = NumberChange(((Decimal(1000), Decimal(2300)),))
TWENTY_THREE = NumberChange(((Decimal(23), Decimal(31)),))
NINETEENTH = NumberChange(((Decimal(19), Decimal(22)),), ordinal=True)
MAY_15 = DateChange(Date(15, "May", "1525"), Date(3, "June", "1525"))
CHANGES = {
    "a whole word": (PONS, "Pons corresponds to Pons.", "Cognac corresponds to Cognac."),
    "cases and genitives": (
        *(PONS, "PONS, Pons's and Pons\u2019 walls", "COGNAC, Cognac's and Cognac\u2019 walls"),
    ),
    "joined words": (PONS, "Pons-born, (Pons)", "Cognac-born, (Cognac)"),
    "plurals, and accents that are left out": (
        *(NameChange("Temüjin", "Sorghan"), "Temujin, two Temüjins", "Sorghan, two Sorghans"),
    ),
    "characters of regular expressions": (
        NameChange("C++ (1998)", "Ada"),
        "The C++ (1998) of Yahoo! is not Coo (1998).",
        "The Ada of Yahoo! is not Coo (1998).",
    ),
    "surname and initial": (
        HUGGINS,
        "Charles Brenton Huggins, Dr. Huggins, C. Huggins, Charles Huggins; HUGGINS; Huggins's.",
        "Paul Samuelson, Dr. Samuelson, Paul Samuelson, Paul Samuelson; SAMUELSON; Samuelson's.",
    ),
    "numbers in their form": (
        *(THOUSAND, "1,000 vs 1000 and one thousand", "2,300 vs 2300 and 2.3 thousand"),
    ),
    "no other numbers": (THOUSAND, *["1000.5, 11000, A1000, 1000s, 10:1000"] * 2),
    "units": (THOUSAND, "$1000 (1000%)", "$2300 (2300%)"),
    "number words": (
        TWENTY_THREE,
        "Twenty-three, twenty three, 23; not 123 or twenty or the 23rd.",
        "Thirty-one, thirty-one, 31; not 123 or twenty or the 23rd.",
    ),
    "ordinals": (NINETEENTH, "the 19th, nineteenth, 19", "the 22nd, twenty-second, 19"),
    "a decade is not its first year": (
        DecadeChange("1990", "1960"),
        "the 1990s, in 1990, the late 1990's",
        "the 1960s, in 1990, the late 1960's",
    ),
    "a date in every order but not of other years": (
        MAY_15,
        "15 May 1525; May 15, 1525; on May 15th; 15 May 1530; May 1525; 15 men",
        "3 June 1525; June 3, 1525; on June 3rd; 15 May 1530; May 1525; 15 men",
    ),
}


@pytest.mark.parametrize(("change", "text", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_is_replaced(change, text, expected):
    assert changed(change, text) == expected


def test_a_decade_is_no_number():
    assert numbers_in("the 1990s") == ()


@pytest.mark.parametrize(
    ("name", "is_person", "text", "reason"),
    [
        ("Robert Koch", True, "Robert Koch met Erich Koch.", "surname of others"),
        ("York", False, "She moved from York to New York.", "longer name"),
        ("Chicago", False, "The Chicago Tribune.", "longer name"),
        ("Joy", False, "The Joy motion was a joy.", "ordinary word"),
    ],
)
def test_what_may_be_another_name_is_refused(name, is_person, text, reason):
    with pytest.raises(Rejected, match=reason):
        NameChange(name, "Paul Samuelson", is_person=is_person).edits(text)


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
