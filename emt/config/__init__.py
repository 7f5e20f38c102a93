"""The settings of a memory: declared once, checked when they are given, to and from YAML."""

from emt.config.memory_config import SETTINGS, MemoryConfig
from emt.config.setting import Setting, did_you_mean
from emt.config.uncertainty import Uncertainty

__all__ = ["SETTINGS", "MemoryConfig", "Setting", "Uncertainty", "did_you_mean"]
