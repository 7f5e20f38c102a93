"""What is computed in the dtypes that the code asks for, whatever `torch.autocast` is on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Turn autocast off on a device, and on the CPU, where memories may be.

    With it on, matrix products of float32 tensors are computed in half precision: a search would
    find other rows, and documents would leave rows of another dtype than the model's.
    """
    with contextlib.ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
