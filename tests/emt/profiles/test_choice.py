"""Which head profile a memory is routed with: the settings', the store's, or a shipped one."""

import pytest

from emt import HeadProfile, MemoryConfig, attach
from emt.errors import ConfigError
from emt.profiles import choice
from emt.profiles.choice import PROFILE, ProfileChoice, shipped_profiles
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
    for weights, profile in shipped_profiles().items():
        assert profile.weights == weights
        assert HeadProfile.from_json(profile.to_json()).to_json() == profile.to_json()


def test_the_settings_come_before_the_store_and_that_before_what_is_shipped(
    world, tmp_path, monkeypatch
):
    _, memory, profile = world
    model, backend = attached_model(memory), memory.backend
    config = MemoryConfig()
    assert ProfileChoice(model).find(config, backend) is None
    with pytest.raises(ConfigError, match=r"needs a head profile .* memory\.make_profile\(\)"):
        ProfileChoice(model).required(config, backend)
    monkeypatch.setattr(choice, "shipped_profiles", lambda: {profile.weights: profile})
    profiles = ProfileChoice(model)
    assert profiles.find(config, backend) is profile
    stored = profile_of(build("llama"), ((1, 1),))
    backend.set_setting(PROFILE, stored.to_json())
    assert profiles.required(config, backend) is profile  # until it is looked for again
    profiles.look_again(config, backend)
    kept = profiles.required(config, backend)
    assert kept.to_json() == stored.to_json()
    profiles.look_again(config, backend)
    assert profiles.required(config, backend) is kept
    given = profile_of(build("llama"), ((2, 0),))
    given.write(tmp_path / "p.json")
    config = MemoryConfig(profile=tmp_path / "p.json")
    assert profiles.required(config, backend).to_json() == given.to_json()


def test_a_profile_of_a_model_of_another_shape_is_refused(world):
    _, memory, profile = world
    data = profile.to_json()
    data["heads"][0]["layer"] = 7
    memory.backend.set_setting(PROFILE, data)
    with pytest.raises(ConfigError, match="names layer 7"):
        ProfileChoice(attached_model(memory)).find(MemoryConfig(), memory.backend)


def test_a_store_keeps_its_profile(tmp_path):
    model = build("llama")
    profile = profile_of(model)
    memory = attach(model, MemoryConfig(path=tmp_path / "m"))
    memory.write(list(range(3, 30)), document="d")
    memory.keep_profile(profile)
    memory.close()
    memory.open(tmp_path / "m")
    assert memory.profile.to_json() == profile.to_json()
