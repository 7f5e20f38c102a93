"""Which head profile a memory is routed with: the settings', the store's, or one of the model."""

import json
import logging

import torch
import pytest

from emt import HeadProfile, MemoryConfig, attach, detach
from emt.errors import ConfigError
from emt.profiles import choice
from emt.profiles.cache import cache_profile
from emt.profiles.choice import PROFILE, ProfileChoice, known_profiles, shipped_profiles
from memory_backends.store.sketch import Sketch
from tests.emt.routing.worlds import attached_model, profile_of
from tests.families import build


@pytest.fixture
def world():
    """A model, its attached memory, and a profile of some of its heads."""
    model = build("llama")
    profile = profile_of(model)
    return model, attach(model), profile


def test_shipped_profiles_can_be_read():
    assert shipped_profiles()
    for profile in shipped_profiles():
        assert known_profiles(profile.sketch) == [profile]
        assert HeadProfile.from_json(profile.to_json()).to_json() == profile.to_json()


def test_the_settings_come_before_the_store_and_that_before_the_models(
    world, tmp_path, monkeypatch
):
    _, memory, profile = world
    model, backend = attached_model(memory), memory.backend
    config = MemoryConfig.published()
    assert ProfileChoice(model).find(config, backend) is None
    with pytest.raises(ConfigError, match=r"needs a head profile .* memory\.make_profile\(\)"):
        ProfileChoice(model).required(config, backend)
    monkeypatch.setattr(choice, "shipped_profiles", lambda: (profile,))
    assert ProfileChoice(model).find(config, backend) is profile
    cached = profile_of(build("llama"), ((0, 2),))
    cache_profile(cached)
    profiles = ProfileChoice(model)
    assert profiles.required(config, backend).to_json() == cached.to_json()
    stored = profile_of(build("llama"), ((1, 1),))
    backend.set_setting(PROFILE, stored.to_json())
    assert profiles.required(config, backend).heads == cached.heads  # until it is looked for again
    profiles.look_again(config, backend)
    kept = profiles.required(config, backend)
    assert kept.to_json() == stored.to_json()
    profiles.look_again(config, backend)
    assert profiles.required(config, backend) is kept
    given = profile_of(build("llama"), ((2, 0),))
    given.write(tmp_path / "p.json")
    config = MemoryConfig.published(profile=tmp_path / "p.json")
    assert profiles.required(config, backend).to_json() == given.to_json()


def test_a_profile_that_another_process_makes_is_used_from_the_next_change_on(world):
    _, memory, profile = world
    assert memory.profile is None
    cache_profile(profile)
    assert memory.profile is None
    memory.write(list(range(3, 20)), document="d")
    assert memory.profile.to_json() == profile.to_json()


def test_a_profile_of_a_model_of_another_shape_is_refused(world):
    _, memory, profile = world
    data = profile.to_json()
    data["heads"][0]["layer"] = 7
    memory.backend.set_setting(PROFILE, data)
    with pytest.raises(ConfigError, match="names layer 7"):
        ProfileChoice(attached_model(memory)).find(MemoryConfig.published(), memory.backend)


def test_a_cached_profile_that_does_not_fit_is_left_out(world, caplog):
    _, memory, profile = world
    path = cache_profile(profile)
    data = profile.to_json()
    data["heads"][0]["layer"] = 7
    path.write_text(json.dumps(data))
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert (
            ProfileChoice(attached_model(memory)).find(MemoryConfig.published(), memory.backend)
            is None
        )
    assert "names layer 7" in caplog.text
    assert len(caplog.records) == 1


def test_a_stores_profile_of_an_older_version_is_left_out(world, caplog):
    _, memory, profile = world
    old = {**profile.to_json(), "version": 1, "weights": "43dd91d5e4b83f6b"}
    memory.backend.set_setting(PROFILE, old)
    caplog.set_level(logging.WARNING)
    assert (
        ProfileChoice(attached_model(memory)).find(MemoryConfig.published(), memory.backend) is None
    )
    assert "older version" in caplog.text
    memory.keep_profile(profile)
    assert memory.profile.to_json() == profile.to_json()


@pytest.mark.parametrize(
    ("change", "is_known"),
    [
        (lambda name, tensor: tensor.bfloat16(), True),
        (lambda name, tensor: tensor.half(), True),
        (lambda name, tensor: (10 * tensor).round() / 10 if "proj" in name else tensor, True),
        (lambda name, tensor: (9 * tensor).char().flatten() if "up" in name else tensor, True),
        (lambda name, tensor: tensor + tensor.std() / 9 * torch.randn_like(tensor), True),
        (lambda name, tensor: tensor + tensor.std() * torch.randn_like(tensor), False),
        (lambda name, tensor: torch.randn_like(tensor), False),
    ],
    ids=["bfloat16", "float16", "quantised", "packed", "tuned", "trained anew", "another"],
)
def test_who_has_the_profile_of_a_model(world, change, is_known):
    model, _, profile = world
    cache_profile(profile)
    weights = {
        name.removeprefix("model."): change(name, tensor.detach())
        for name, tensor in model.named_parameters()
    }
    known = known_profiles(Sketch.of("llama", 3, weights.items()))
    assert [found.heads for found in known] == [profile.heads] * is_known
    assert known_profiles(Sketch.of("mistral", 3, weights.items())) == []
    assert known_profiles(Sketch.of("llama", 4, weights.items())) == []


def test_of_two_profiles_that_of_the_more_alike_weights_is_used(world):
    model, _, own = world
    detach(model)
    tuned = build("llama")
    with torch.no_grad():
        for tensor in tuned.parameters():
            tensor.add_(tensor.std() / 8 * torch.randn_like(tensor))
    of_tuned = profile_of(tuned, ((1, 1),))
    for newer, older in ((own, of_tuned), (of_tuned, own)):
        cache_profile(older)
        cache_profile(newer)
        assert attach(model).profile.heads == own.heads
        assert attach(tuned).profile.heads == of_tuned.heads
        detach(model)
        detach(tuned)


def test_the_same_model_in_another_dtype_has_the_newest_profile(world):
    model, _, _ = world
    detach(model)
    half = build("llama", dtype=torch.bfloat16)
    for newest in (((1, 1),), ((0, 1),)):
        cache_profile(profile_of(model, ((2, 0),)))
        cache_profile(profile_of(half, newest))
        for each in (model, half):
            (head,) = attach(each).profile.heads
            assert [(head.layer, head.head)] == list(newest)
            detach(each)


def test_a_store_keeps_its_profile(tmp_path):
    model = build("llama")
    profile = profile_of(model)
    memory = attach(model, MemoryConfig.published(path=tmp_path / "m"))
    memory.write(list(range(3, 30)), document="d")
    memory.keep_profile(profile)
    memory.close()
    memory.open(tmp_path / "m")
    assert memory.profile.to_json() == profile.to_json()
