"""Attention classes that compute inline, taught to send their attention through `emt.hook`."""

from emt.adapters.installing import Adapted, install, remove

__all__ = ["Adapted", "install", "remove"]
