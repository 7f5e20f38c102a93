"""The settings of a memory: declared once, checked when they are given, to and from YAML."""

from emt.config.memory_config import SETTINGS, MemoryConfig
from emt.config.model_config import MODEL_SETTINGS, ModelConfig
from emt.config.setting import Setting, check_names
from emt.config.uncertainty import Uncertainty

__all__ = [
    "MODEL_SETTINGS",
    "SETTINGS",
    "MemoryConfig",
    "ModelConfig",
    "Setting",
    "Uncertainty",
    "check_names",
]
