from pathlib import Path

import pytest

from emt.user_cache import user_cache


def test_the_environment_says_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("EMT_CACHE", "/own")
    assert user_cache() == Path("/own")
    monkeypatch.delenv("EMT_CACHE")
    assert user_cache() == Path("/caches/emt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache" / "emt"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMT_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(OSError, match="home directory in '~nobody"):
        user_cache()
