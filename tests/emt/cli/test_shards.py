"""Sharded stores on the command line: made, looked after, searched, split and merged."""

import shutil

import pytest

from emt.cli import main
from memory_backends.sharded import is_sharded, shard_of, shards_at
from tests.emt.commands import TEXTS, emt, emt_json, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory, indexed, model):
    """A folder with the same documents in a sharded store."""
    folder = tmp_path_factory.mktemp("sharded")
    emt(
        "index", indexed / "documents", "--store", folder / "store", "--model", model, "--shards", 3
    )
    return folder / "store"


@pytest.fixture
def sharded(made, tmp_path):
    return shutil.copytree(made, tmp_path / "sharded")


def answer_of(store, *options):
    answered = emt_json("generate", "w5 w6 w7", "--store", store, "--max-new-tokens", 5, *options)
    return {key: answered[key] for key in ("text", "citations", "passages", "token_ids")}


def test_index_makes_shards_and_goes_on(indexed, sharded, model, more):
    """The same command again skips, and new files are read into their shards."""
    described, one = emt_json("info", sharded), emt_json("info", indexed / "store")
    assert described["documents"] == one["documents"]
    assert described["index"]["num_rows"] == one["index"]["num_rows"]
    assert described["index"]["heads"] == one["index"]["heads"]
    assert described["bytes"]["per_row"] == one["bytes"]["per_row"]
    assert [shard["documents"] for shard in described["shards"]] == [
        sum(shard_of(name, 3) == number for name in TEXTS) for number in range(3)
    ]
    assert "shards     3" in emt("info", sharded).out
    assert emt("list", sharded).out == emt("list", indexed / "store").out
    done = emt("index", indexed / "documents", more, "--store", sharded, "--shards", 3)
    assert "1 document added, 3 were there already" in done.out
    refused("index", more, "--store", sharded, "--shards", 2, message="3 shards.*changed to 2")
    refused("index", more, "--store", indexed / "store", "--shards", 2, message="emt split")


def test_answers_are_those_of_one_store(indexed, sharded):
    """With any setting of how its shards are searched."""
    store = indexed / "store"
    for options in ([], ["--mode", "token"]):
        assert answer_of(sharded, *options) == answer_of(store, *options)
    found = [emt_json("search", "w40 w41", "--store", path) for path in (sharded, store)]
    assert found[0] == found[1]


def test_remove_compact_rebuild_and_verify(sharded):
    emt("remove", sharded, "b.md")
    assert "b.md" not in emt("list", sharded).out
    emt("compact", sharded)
    assert "rebuilt Flat over 70 rows" in emt("rebuild", sharded).out
    assert "no damage" in emt("verify", sharded).out
    shard = shards_at(sharded)[shard_of("c", 3)]
    file = next((shard / "rows").iterdir())
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    done = emt("verify", sharded, code=1)
    assert done.out.startswith(f"shards/{shard.name}/rows/{file.name}: document '")


def test_split_and_merge(indexed, tmp_path):
    """Answers stay, and so do indexes, and what is known of files and the model."""
    store = indexed / "store"
    emt("split", store, "--shards", 2, "--into", tmp_path / "many")
    emt("merge", tmp_path / "many", "--into", tmp_path / "one")
    assert is_sharded(tmp_path / "many")
    expected = emt_json("info", store)
    for path in (tmp_path / "many", tmp_path / "one"):
        assert answer_of(path) == answer_of(store)
        described = emt_json("info", path)
        assert described["index"]["heads"] == expected["index"]["heads"]
        assert described["model"] == expected["model"]
        assert emt_json("list", path)["documents"] == emt_json("list", store)["documents"]
    refused("merge", store, tmp_path / "many", "--into", tmp_path / "x", message="'a.txt', 'b.md'")
    assert not (tmp_path / "x").exists()


def test_a_missing_shard_is_said(sharded, tmp_path):
    """An error, or a line and a field beside the answer of the others."""
    number = shard_of("c", 3)
    shutil.rmtree(shards_at(sharded)[number])
    refused("search", "w40", "--store", sharded, message=f"shard {number} of")
    (tmp_path / "warn.yaml").write_text("store:\n  missing_shards: warn\n")
    arguments = ("search", "w40", "--store", sharded, "--config", tmp_path / "warn.yaml")
    assert emt_json(*arguments)["missing_shards"] == [number]
    assert f"not found: {number}." in emt(*arguments).err
    assert f"cannot be read: {number}" in emt("info", sharded).out


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "merge" in capsys.readouterr().out
