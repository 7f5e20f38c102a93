"""Rankings of windows joined into one."""

from emt.routing.evidence import Window
from emt.routing.fusion import fuse_rankings


def test_rankings_are_joined():
    first = [Window(1000, 0.9), Window(2000, 0.5), Window(3000, 0.2)]
    second = [Window(2040, 1.0), Window(5000, 0.7), Window(960, 0.1)]
    fused = fuse_rankings([first, second], min_distance=100)
    expected = [(2000, 0.5), (1000, 0.9), (5000, 0.0), (3000, 0.2)]
    assert [(window.peak, window.score) for window in fused] == expected
    assert fuse_rankings([[], second], min_distance=100)[0] == Window(2040, 0.0)
    assert fuse_rankings([[], []], min_distance=100) == []
