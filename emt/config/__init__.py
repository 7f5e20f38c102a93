"""The settings of a memory: declared once, checked when they are given, to and from YAML."""

from emt.config.memory_config import PUBLISHED_METHOD, SETTINGS, MemoryConfig
from emt.config.setting import Setting, check_names
from emt.config.uncertainty import Uncertainty

__all__ = ["PUBLISHED_METHOD", "SETTINGS", "MemoryConfig", "Setting", "Uncertainty", "check_names"]
