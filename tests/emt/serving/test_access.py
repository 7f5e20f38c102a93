"""What a scope lets through, and names that tell nothing of other scopes."""

import itertools
import random
import types

import pytest

pytest.importorskip("fastapi")

from emt.errors import DocumentError
from emt.serving.access import Access
from emt.serving.errors import ServingError


def catalog_of(documents):
    """Return as much of a catalogue as an access asks for, of name -> metadata."""

    def metadata(name):
        if name not in documents:
            raise DocumentError(name)
        return documents[name]

    return types.SimpleNamespace(
        metadata=metadata,
        all_metadata=lambda: {name: value for name, value in documents.items() if value},
        document_names=lambda: list(documents),
        has_document=lambda name: name in documents,
    )


ANN = Access({"user": "ann"})


@pytest.mark.parametrize(
    ("own", "asked", "both"),
    [
        ({}, None, {}),
        ({}, {}, {}),
        ({}, {"a": 1}, {"a": [1]}),
        ({"user": "ann"}, None, {"user": ["ann"]}),
        ({"user": "ann"}, {}, {"user": ["ann"]}),
        ({"user": "ann"}, {"a": [1, 2]}, {"user": ["ann"], "a": [1, 2]}),
        ({"user": "ann"}, {"user": "bob"}, {"user": []}),
        ({"user": "ann"}, {"user": ["bob", "ann"]}, {"user": ["ann"]}),
        ({"user": ["ann", "eve"]}, {"user": ["bob", "eve"]}, {"user": ["eve"]}),
        ({"user": 1}, {"user": [True, 1.0, "1"]}, {"user": [1.0]}),
        ({"user": True}, {"user": [1]}, {"user": []}),
    ],
)
def test_a_request_can_only_narrow_a_scope(own, asked, both):
    assert Access(own).narrowed(asked) == both


@pytest.mark.parametrize("asked", [[], "user", {"user": None}, {"user": {}}, {1: "a"}])
def test_what_is_no_filter_is_refused(asked):
    with pytest.raises(DocumentError, match="where must"):
        ANN.narrowed(asked)


def test_a_document_that_is_not_to_be_seen_is_unknown():
    catalog = catalog_of({"hers": {"user": "ann"}, "theirs": {"user": "bob"}})
    assert ANN.scope(catalog, ["hers"]) == {"documents": ["hers"], "where": {"user": ["ann"]}}
    told = set()
    for name in ("theirs", "none"):
        with pytest.raises(DocumentError) as caught:
            ANN.scope(catalog, ["hers", name])
        told.add(str(caught.value).replace(name, "NAME"))
    assert told == {"no document 'NAME' in this memory."}
    assert Access().scope(catalog, ["theirs"]) == {"documents": ["theirs"]}
    assert Access().scope(catalog) == {}


def test_names_in_an_answer_and_in_the_store_belong_to_each_other():
    generator = random.Random(0)
    names = ["", "user=ann/", "user=bob/", "user=ann/user=ann/", "user=ann/user=bob/"]
    names = [prefix + name for prefix, name in itertools.product(names, ("x", "y", "user=ann/"))]
    for _ in range(300):
        documents = {
            name: {"user": generator.choice(["ann", "bob"])}
            for name in generator.sample(names, generator.randint(0, 9))
        }
        catalog = catalog_of(documents)
        for access in (ANN, Access({"user": ["bob"]}), Access()):
            seen = {
                name
                for name, metadata in documents.items()
                if not access.where or metadata["user"] in access.where["user"]
            }
            shown = {access.shown_name(catalog, stored): stored for stored in seen}
            assert access.documents(catalog) == shown
            assert sorted(shown.values()) == sorted(seen)  # no two have one name
            for name in [*names, *shown]:
                assert access.stored_name(catalog, name) == shown.get(name)
                try:
                    new = access.new_name(catalog, name)
                except ServingError:
                    assert access is not ANN or f"user=ann/{name}" in documents
                else:
                    assert new == shown.get(name, new)
                    assert (new in documents) == (name in shown)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *itertools.combinations(
            [
                {"user": "ann"},
                {"user": "ann/x"},
                {"user": "ann&team=a"},
                {"user": "ann", "team": "a"},
                {"user": ["ann", "bob"]},
                {"user": "ann|bob"},
                {"user": 1},
                {"user": "1"},
                {"user": True},
                {"user": "true"},
                {"user/x": "ann"},
                {"user=ann": ""},
            ],
            2,
        )
    ],
)
def test_two_scopes_never_write_one_name(one, other):
    """What one calls anything at all, the other cannot call something."""
    first, second = (Access(where).new_name(catalog_of({}), "n") for where in (one, other))
    assert first[:-1] != second[:-1]
    assert not first.startswith(second[:-1])
    assert not second.startswith(first[:-1])


def test_what_a_key_writes_is_in_its_scope():
    assert ANN.stamped({"t": 1}) == {"t": 1, "user": "ann"}
    assert ANN.stamped({"user": "ann"}) == {"user": "ann"}
    assert Access().stamped({"user": "bob"}) == {"user": "bob"}
    teams = Access({"team": ["a", "b"]})
    assert teams.stamped({"team": "b"}) == {"team": "b"}
    for access, metadata, status in (
        (ANN, {"user": "bob"}, 403),
        (teams, {}, 400),
        (teams, {"team": 1}, 403),
    ):
        with pytest.raises(ServingError) as caught:
            access.stamped(metadata)
        assert (caught.value.status, caught.value.param) == (status, "metadata")


def test_a_name_whose_document_left_the_scope():
    catalog = catalog_of({"user=ann/x": {"user": "bob"}})
    with pytest.raises(ServingError, match="Choose another") as caught:
        ANN.new_name(catalog, "x")
    assert caught.value.status == 409
