import types

import emt
import emt.errors


def test_all_is_sorted_and_complete():
    assert emt.__all__ == sorted(emt.__all__)
    public = {
        name
        for name, value in vars(emt).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(emt.__all__)


def test_the_names_a_user_learns():
    assert emt.__all__ == [
        "Citation",
        "ConfigError",
        "CorpusError",
        "DocumentError",
        "EMTError",
        "ExtendedLlamaForCausalLM",
        "ExtendedMindForCausalLM",
        "ExtendedMptForCausalLM",
        "HeadProfile",
        "IndexFactoryError",
        "Memory",
        "MemoryBackend",
        "MemoryConfig",
        "MemoryMismatchError",
        "MemoryUseError",
        "Passage",
        "Recording",
        "Routed",
        "RoutedPassage",
        "RowCitation",
        "StoreError",
        "UnsupportedModelError",
        "attach",
        "detach",
        "memory_attention",
    ]


def test_every_error_is_ours_and_the_builtin_that_fits():
    bases = {
        "ConfigError": ValueError,
        "CorpusError": ValueError,
        "DocumentError": ValueError,
        "EMTError": Exception,
        "IndexFactoryError": ValueError,
        "MemoryMismatchError": ValueError,
        "MemoryUseError": RuntimeError,
        "StoreError": OSError,
        "UnsupportedModelError": NotImplementedError,
    }
    assert emt.errors.__all__ == sorted(bases)
    for name, builtin in bases.items():
        error = getattr(emt.errors, name)
        assert issubclass(error, builtin)
        assert issubclass(error, emt.errors.EMTError)
        assert name in emt.errors.__doc__
