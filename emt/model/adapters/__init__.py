"""Attention classes that compute inline, taught to attend through `emt.model.hook`."""

from emt.model.adapters.installing import Adapted, install, remove

__all__ = ["Adapted", "install", "remove"]
