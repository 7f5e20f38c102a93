"""Adapters for attention classes that compute inline, without transformers' interface."""

from emt.model.adapters.installing import Adapted, install, remove

__all__ = ["Adapted", "install", "remove"]
