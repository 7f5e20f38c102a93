"""Head profiles: to JSON and back, and what is refused."""

import json

import torch
import pytest

from emt import attach
from emt.errors import ConfigError
from emt.routing.head_profile import HeadProfile, ProfiledHead
from memory_backends.store.sketch import Sketch
from tests.emt.routing.worlds import attached_model
from tests.families import build

SKETCH = Sketch.of("llama", 3, [("norm", torch.arange(9.0)), ("q", torch.ones(4, 4))])
HEADS = (ProfiledHead(2, 3, 0.75), ProfiledHead(0, 1, 0.5), ProfiledHead(2, 0, 0.25))


def profile(**changes):
    torch.manual_seed(2)
    fields = {"model": "m", "sketch": SKETCH, "heads": HEADS, "means": torch.randn(3, 16) / 4}
    return HeadProfile(**{**fields, "distance": 64, "source": "s", **changes})


@pytest.fixture(scope="module")
def model():
    """What is known of a llama with 4 query heads and 2 KV heads a layer."""
    return attached_model(attach(build("llama")))


def test_there_and_back(tmp_path):
    written = profile()
    written.write(tmp_path / "p.json")
    read = HeadProfile.read(tmp_path / "p.json")
    assert read.to_json() == written.to_json() == json.loads((tmp_path / "p.json").read_text())
    assert (read.model, read.heads) == ("m", HEADS)
    assert (read.distance, read.source) == (64, "s")
    assert (read.means - written.means).abs().max() <= 5.01e-5
    assert read.layers == (0, 2)
    assert torch.equal(read.sketch.values, SKETCH.values)


def test_without_a_sketch(tmp_path):
    profile(sketch=None).write(tmp_path / "p.json")
    assert HeadProfile.read(tmp_path / "p.json").sketch is None


def test_the_key_value_heads_that_are_searched(model):
    profile().check(model.query_heads, model.layout)
    assert profile().key_value_heads(model.query_heads, model.layout) == {0: [0], 2: [0, 1]}


BAD = {
    "no mapping": lambda data: [data],
    "nothing": lambda data: None,
    "no heads": lambda data: {**data, "heads": []},
    "heads of another kind": lambda data: {**data, "heads": 3},
    "no layer": lambda data: {**data, "heads": [{"head": 1, "hit_rate": 1, "mean": [0.0]}]},
    "means of two lengths": lambda data: {
        **data,
        "heads": [{**data["heads"][0], "mean": [0.0] * n} for n in (3, 4)],
    },
    "means of words": lambda data: {**data, "heads": [{**data["heads"][0], "mean": ["a"]}]},
    "means that are no numbers": lambda data: {
        **data,
        "heads": [{**data["heads"][0], "mean": [float("nan")]}],
    },
    "an endless distance": lambda data: {**data, "distance": float("inf")},
    "a distance before": lambda data: {**data, "distance": -1},
    "no version": lambda data: {key: value for key, value in data.items() if key != "version"},
    "no sketch": lambda data: {key: data[key] for key in data if key != "sketch"},
    "a sketch of another kind": lambda data: {**data, "sketch": "43dd91d5e4b83f6b"},
    "a damaged sketch": lambda data: {**data, "sketch": {**data["sketch"], "values": "AAAA"}},
    "no distance": lambda data: {key: data[key] for key in data if key != "distance"},
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_profile(what, tmp_path):
    data = BAD[what](profile().to_json())
    with pytest.raises(ConfigError, match=r"^this is no head profile \(\w+: .*emt profile"):
        HeadProfile.from_json(data)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"p\.json': this is no head profile"):
        HeadProfile.read(tmp_path / "p.json")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.json' cannot be read"):
        HeadProfile.read(tmp_path / "a.json")
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "b.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"b\.json' cannot be read"):
            HeadProfile.read(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        profile().write(tmp_path / "no" / "p.json")


def test_another_version():
    data = {**profile().to_json(), "version": 1}
    with pytest.raises(ConfigError, match=r"^expected a head profile of version 2; got 1\. "):
        HeadProfile.from_json(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (ProfiledHead(7, 0, 0.5),) * 3}, "names layer 7, head 0"),
        ({"heads": (ProfiledHead(0, 4, 0.5),) * 3}, "names layer 0, head 4"),
        ({"heads": (ProfiledHead(0, -1, 0.5),) * 3}, "names layer 0, head -1"),
        ({"means": torch.zeros(3, 8)}, "heads with 8 dims; this model's have 16"),
    ],
)
def test_profiles_of_models_of_another_shape(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        profile(**changes).check(model.query_heads, model.layout)
