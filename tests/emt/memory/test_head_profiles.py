"""One head profile for all memories of a model: made when one is saved, and kept with its store."""

import logging
from types import SimpleNamespace

import torch
import pytest

from emt import MemoryConfig, attach, detach
from emt.memory.head_profiles import HeadProfiles
from emt.profiles import choice
from emt.profiles.cache import cache_profile, cached_profiles
from tests.emt.routing.worlds import profile_of
from tests.emt.words import word_tokenizer
from tests.families import build

DOCUMENT = [(7 * number) % 90 + 5 for number in range(40)]


@pytest.fixture
def ranked(monkeypatch):
    """Make rankings cost nothing; return the profiles that they made."""
    made = []

    def rank(profiles, examples, *, on_tokens=None, **options):
        if on_tokens is not None:
            on_tokens(0, 10)
            on_tokens(10, 10)
        made.append(profile_of(build("llama")))
        return SimpleNamespace(profile=made[-1])

    monkeypatch.setattr(HeadProfiles, "rank", rank)
    return made


def remembering(path, dtype=torch.float32, **settings):
    options = {"mode": "passage", "path": path, "memory_type": "manual", **settings}
    memory = attach(
        build("llama", dtype=dtype), MemoryConfig.published(**options), tokenizer=word_tokenizer()
    )
    memory.write(DOCUMENT, document="d", replace=True)
    return memory


def kept_in(memory):
    return memory.backend.catalog.setting("head_profile")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Return a function that moves to a machine whose user has no profiles yet."""
    return lambda: monkeypatch.setenv("EMT_CACHE", str(tmp_path / "elsewhere"))


def test_a_profile_is_made_once_for_all_memories_of_a_model(tmp_path, ranked, caplog):
    caplog.set_level(logging.WARNING, "emt")
    first = remembering(tmp_path / "a")
    assert ranked == []
    steps = []
    first.save(on_tokens=lambda num_read, total: steps.append((num_read, total)))
    assert len(ranked) == 1
    assert steps == [(0, 10), (10, 10)]
    assert caplog.text.count("no head profile: one is made, and kept for all its memories") == 1
    (cached,) = cached_profiles()
    assert first.profile.to_json() == cached.to_json() == kept_in(first)
    for name, dtype in (("b", torch.float32), ("c", torch.bfloat16)):
        other = remembering(tmp_path / name, dtype)
        assert other.profile is cached
        other.save()
        assert kept_in(other) == cached.to_json()
    first.save()
    assert len(ranked) == 1


def test_a_store_is_routed_elsewhere_by_the_heads_that_were_indexed(tmp_path, ranked, elsewhere):
    memory = remembering(tmp_path / "m")
    memory.save()
    profile = memory.profile.to_json()
    elsewhere()
    assert cached_profiles() == []
    opened = remembering(tmp_path / "m")
    assert opened.profile.to_json() == profile
    cache_profile(profile_of(build("llama"), ((1, 1),)))  # of the user there
    assert remembering(tmp_path / "m").profile.to_json() == profile
    assert len(ranked) == 1


def test_questions_make_no_profile(tmp_path, ranked):
    memory = remembering(tmp_path / "m")
    assert memory.profile is None
    assert memory.lacks_profile
    assert ranked == cached_profiles() == []
    assert kept_in(memory) is None


def test_token_mode_is_given_a_profile_if_its_heads_are_to_read(tmp_path, ranked):
    memory = remembering(
        tmp_path / "m", mode="token", heads="profile", memory_type="vector_db", index="Flat"
    )
    assert memory.heads_to_index == {idx: range(2) for idx in memory.layers}
    memory.save()
    assert kept_in(memory) == ranked[0].to_json()
    assert memory.heads_to_index == {0: [0], 2: [1]}
    heads = memory.backend.catalog.setting("index")["heads"]
    assert heads == {"0": [0], "2": [1]}


def test_no_copy_is_kept_of_what_every_user_has_or_brings(tmp_path, ranked, monkeypatch):
    profile = profile_of(build("llama"))
    profile.write(tmp_path / "p.json")
    given = remembering(tmp_path / "given", profile=tmp_path / "p.json")
    given.save()
    assert kept_in(given) is None
    for module in ("emt.profiles.choice", "emt.memory.head_profiles"):
        monkeypatch.setattr(f"{module}.shipped_profiles", lambda: (profile,))
    shipped = remembering(tmp_path / "shipped")
    assert shipped.profile is profile
    shipped.save()
    assert kept_in(shipped) is None
    assert choice.known_profiles(profile.sketch) == [profile]
    assert ranked == []


def test_a_memory_in_token_mode_neither_makes_nor_keeps_one(tmp_path, ranked):
    cache_profile(profile_of(build("llama")))
    memory = remembering(tmp_path / "m", mode="token")
    memory.save()
    assert kept_in(memory) is None
    assert ranked == []


def test_without_a_cache_the_store_keeps_it(tmp_path, ranked, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMT_CACHE", str(tmp_path / "file"))
    memory = remembering(tmp_path / "m")
    memory.save()
    assert kept_in(memory) == memory.profile.to_json()
    detach(memory._attached("test").model())
    assert remembering(tmp_path / "m").profile is not None
    assert len(ranked) == 1


def test_a_profile_that_was_chosen_for_one_memory_is_of_no_other(tmp_path, ranked):
    chosen = profile_of(build("llama"), ((1, 1),))
    memory = remembering(tmp_path / "m")
    memory.keep_profile(chosen)
    memory.save()
    assert memory.profile.to_json() == kept_in(memory) == chosen.to_json()
    assert cached_profiles() == []
    assert remembering(tmp_path / "other").profile is None
    assert memory.make_profile().to_json() == kept_in(memory) == cached_profiles()[0].to_json()
