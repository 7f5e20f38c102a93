import pytest

from emt import MemoryConfig
from emt.errors import ConfigError
from emt.ingest.windows import Window, Windows, check_max_length
from tests.families import build


def marked_windows(num_tokens, stride, max_length):
    """Go through the starts as the published encoder does, marking tokens one by one."""
    done = [False] * num_tokens
    result = []
    start = 0
    while not all(done):
        run = [token for token in range(num_tokens) if start <= token < start + max_length]
        new = [token for token in run if not done[token]]
        for token in new:
            done[token] = True
        result.append((run, new))
        start += stride
    return result


@pytest.mark.parametrize("stride", range(1, 9))
def test_windows_against_a_slow_enumeration(stride):
    for max_length in range(stride, 9):
        windows = Windows(stride, max_length)
        for num_tokens in range(30):
            cut = [
                (list(range(start, stop)), list(range(keep_from, stop)))
                for start, stop, keep_from in windows.cut(num_tokens)
            ]
            assert cut == marked_windows(num_tokens, stride, max_length)


def test_windows_at_the_published_settings():
    model_config = build("llama").config
    windows = Windows.of(MemoryConfig.published(), model_config)
    assert windows == Windows(512, 3072)
    assert list(windows.cut(4000)) == [
        Window(0, 3072, 0),
        Window(512, 3584, 3072),
        Window(1024, 4000, 3584),
    ]
    carrying = Windows.of(MemoryConfig.published(carry_context=True), model_config)
    assert carrying == Windows(512, 3072, carry_context=True)


@pytest.mark.parametrize(
    ("positions", "stride", "expected"),
    [
        (10_000, 512, (512, 3072)),
        (3072, 3072, (1536, 3072)),  # two strides fit
        (1024, 512, (512, 1024)),
        (1023, 512, (511, 1023)),
        (600, 512, (300, 600)),
        (600, 100, (100, 600)),
        (1, 512, (1, 1)),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mpt"])
def test_windows_of_automatic_length_fit_the_model(model_type, positions, stride, expected):
    name = {"llama": "max_position_embeddings", "mpt": "max_seq_len"}[model_type]
    model_config = build(model_type, **{name: positions}).config
    windows = Windows.of(MemoryConfig(stride=stride), model_config)
    assert windows == Windows(*expected, carry_context="auto")
    check_max_length(model_config, windows.max_length)
    given = MemoryConfig(stride=stride, max_length=max(stride, 700))
    assert Windows.of(given, model_config).max_length == max(stride, 700)  # whatever fits


def test_windows_of_a_model_without_a_limit_are_as_published():
    assert Windows.of(MemoryConfig(), build("bloom").config) == Windows(512, 3072, "auto")


def test_windows_longer_than_the_model_are_refused():
    for config in (
        build("llama", max_position_embeddings=64).config,
        build("mpt", max_seq_len=64).config,
    ):
        check_max_length(config, 64)
        with pytest.raises(ConfigError, match=r"max_length \(65\) .* 64"):
            check_max_length(config, 65)
    check_max_length(build("bloom").config, 10**6)
