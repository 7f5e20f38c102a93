import pytest

from emt.cli import printing


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (5e15, "5000.0 TB")],
)
def test_sizes(num_bytes, text):
    assert printing.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (9e5, "250:00:00")],
)
def test_durations(seconds, text):
    assert printing.duration(seconds) == text
