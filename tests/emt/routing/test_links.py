"""Documents that a text names: by the words of their names, whole and in a row."""

import pytest

from emt.routing.links import LinkIndex, title_of
from tests.emt.routing.worlds import build, document, routing


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Civil_disobedience.txt", ("civil", "disobedience")),
        ("notes/towns/Gadford.md", ("gadford",)),
        ("St. Louis", ("st", "loui")),
        ("The Museum of Ferries", ("museum", "ferry")),
        ("Version 2.5", ("version", "2", "5")),
        ("Zürich", ("zurich",)),
        ("2014", ()),
        ("2014-07.txt", ()),
        ("the", ()),
    ],
)
def test_a_title_is_the_words_of_a_name(name, title):
    assert title_of(name) == title


@pytest.fixture(scope="module")
def backend():
    memory = routing(build("llama"))
    for number, name in enumerate(("Polar Bee", "Polar", "towns/Gadford.md", "ships/Gadford.txt")):
        memory.write(document(number), document=name)
    return memory.backend


def test_documents_are_named_by_whole_titles_in_the_order_of_the_text(backend):
    links = LinkIndex()
    text = "She lives in Gadford's harbour, on the Polar Bee. Gadford is near."
    assert links.named_in(text, backend) == [
        "towns/Gadford.md",
        "ships/Gadford.txt",
        "Polar Bee",
        "Polar",
    ]
    assert links.named_in("a bee of the polar kind; Gadfords", backend) == [
        "Polar",
        "towns/Gadford.md",
        "ships/Gadford.txt",
    ]
    assert links.named_in("nothing of that", backend) == []


def test_what_is_known_names_nothing_more(backend):
    links = LinkIndex()
    known = "Where is the Polar Bee?"
    assert links.named_in("The Polar Bee of Gadford", backend, known=known) == [
        "towns/Gadford.md",
        "ships/Gadford.txt",
    ]


def test_titles_are_read_again_when_documents_come_and_go():
    memory, links = routing(build("llama")), LinkIndex()
    assert links.named_in("Gadford and one", memory.backend) == ["one"]
    memory.write(document(3), document="Gadford")
    assert links.named_in("Gadford and one", memory.backend) == ["Gadford", "one"]
    memory.remove("one")
    assert links.named_in("Gadford and one", memory.backend) == ["Gadford"]
    other = routing(build("llama"))
    assert links.named_in("Gadford and one", other.backend) == ["one"]
