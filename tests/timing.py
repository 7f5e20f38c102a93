"""Is the time of a function linear in the size of its input?"""

import time
from collections.abc import Callable


def is_linear(call: Callable[[int], object], size: int) -> bool:
    """Tell whether four times the size takes at most eight times as long."""
    return min(_seconds(call, 4 * size) for _ in range(3)) <= 8 * max(
        min(_seconds(call, size) for _ in range(3)), 0.002
    )


def _seconds(call: Callable[[int], object], size: int) -> float:
    """Return the processor time of this thread: others may use the machine, too."""
    started = time.thread_time()
    call(size)
    return time.thread_time() - started
