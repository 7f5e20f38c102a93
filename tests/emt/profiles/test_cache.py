"""Head profiles in the user's cache: kept whole or not at all, and never a reason to fail."""

import json
import logging
import threading

import pytest

from emt.profiles.cache import cache_profile, cached_profiles
from tests.emt.routing.worlds import profile_of
from tests.families import build


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The directory of the profiles, in a cache that does not exist yet."""
    monkeypatch.setenv("EMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


@pytest.fixture
def profile():
    return profile_of(build("llama"))


def named(profile, name, heads=((1, 0),)):
    changed = profile_of(build("llama"), heads)
    return type(profile)(
        name, profile.sketch, changed.heads, changed.means, changed.distance, changed.source
    )


def test_there_and_back(profile, folder):
    assert cached_profiles() == []
    path = cache_profile(profile)
    assert [path] == list(folder.iterdir())
    assert path.name.startswith("tiny-")
    (read,) = cached_profiles()
    assert read.to_json() == profile.to_json()
    assert cached_profiles()[0] is read


def test_a_model_has_one_file_and_the_newest_comes_first(profile, folder):
    for number in range(20):  # faster than the file system's clock
        newest = named(profile, "tiny", ((number % 3, number % 4),))
        cache_profile(newest)
        (read,) = cached_profiles()
        assert read.heads == newest.heads
    other = profile_of(build("mistral"))
    cache_profile(named(other, "other"))
    assert [found.model for found in cached_profiles()] == ["other", "tiny"]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("org/Model 1.5B (q4).gguf", "org-Model-1.5B-q4-.gguf-"),
        ("../../etc", "etc-"),
        ("模型", "model-"),
        ("", "model-"),
        ("x" * 500, "x" * 60 + "-"),
    ],
)
def test_any_name_of_a_model_is_a_file_name(profile, folder, name, start):
    path = cache_profile(named(profile, name))
    assert path.parent == folder
    assert path.name.startswith(start)
    assert [found.model for found in cached_profiles()] == [name]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"version": 1}', None])
def test_a_damaged_file_is_left_out_and_said_once(profile, folder, caplog, damage):
    cache_profile(profile)
    if damage is None:
        (folder / "z.json").mkdir()
    else:
        (folder / "z.json").write_bytes(damage)
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        assert [found.heads for found in cached_profiles()] == [profile.heads]
    (record,) = caplog.records
    assert "z.json" in record.getMessage()


def test_a_cache_that_cannot_be_written(profile, folder, caplog):
    folder.parent.write_text("a file in its place")
    caplog.set_level(logging.WARNING)
    assert cache_profile(profile) is None
    assert cached_profiles() == []
    (record,) = caplog.records
    assert "is not kept for other memories" in record.getMessage()


def test_a_user_without_a_home(profile, monkeypatch):
    monkeypatch.setenv("EMT_CACHE", "~nobody-of-this-name/cache")
    assert cache_profile(profile) is None
    assert cached_profiles() == []


def test_a_file_that_cannot_be_read_does_not_hide_the_others(profile, folder):
    cache_profile(profile)
    for name in ("a", "z"):  # before and after it, in whatever order they are listed
        (folder / f"{name}.json").symlink_to(folder / "nothing")
    assert [each.to_json() for each in cached_profiles()] == [profile.to_json()]


def test_many_at_a_time_leave_a_whole_file(profile, folder):
    profiles = [named(profile, "tiny", ((n % 3, n % 4),)) for n in range(12)]
    threads = [threading.Thread(target=cache_profile, args=(each,)) for each in profiles]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(cached_profiles()) <= 1
    (path,) = folder.iterdir()
    assert json.loads(path.read_text()) in [each.to_json() for each in profiles]
