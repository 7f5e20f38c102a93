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
    names = (
        "Polar Bee",
        "Polar",
        "towns/Gadford.md",
        "ships/Gadford.txt",
        "buoys.txt",
        "(.*)",
        "a.md",
    )
    for number, name in enumerate(names):
        memory.write(document(number), document=name)
    return memory.backend


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            "In Gadford's harbour is the Polar Bee. Gadford is near.",
            [["towns/Gadford.md", "ships/Gadford.txt"], ["Polar Bee"]],
        ),
        ("A bee on a Polar ship", [["Polar"]]),
        # Without a capital letter, a word is no name of one; but this file has none itself.
        ("a polar bee of the polar kind, a gadford", [["Polar Bee"]]),
        ("a buoy, Buoys", [["buoys.txt"]]),
        ("(.*) a A nothing of that", []),
        ("", []),
    ],
)
def test_documents_are_named_by_the_longest_titles_in_the_order_of_the_text(backend, text, names):
    assert list(LinkIndex().titles_in(text, backend).values()) == names


def test_a_document_out_of_scope_hides_no_other(backend):
    scope = backend.catalog.scope(["Polar", "ships/Gadford.txt"])
    named = LinkIndex().titles_in("The Polar Bee at Gadford", backend, scope)
    assert list(named.values()) == [["Polar"], ["ships/Gadford.txt"]]


def test_titles_are_read_again_when_documents_come_and_go():
    memory, links = routing(build("llama")), LinkIndex()

    def named(memory):
        titles = links.titles_in("Gadford and one", memory.backend)
        return [name for names in titles.values() for name in names]

    assert named(memory) == ["one"]
    memory.write(document(3), document="Gadford")
    assert named(memory) == ["Gadford", "one"]
    memory.remove("one")
    assert named(memory) == ["Gadford"]
    other = routing(build("llama"))
    assert named(other) == ["one"]
