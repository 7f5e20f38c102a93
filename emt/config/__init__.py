"""The settings of a memory and of its model: declared once, checked when given, read from YAML."""

from emt.config.memory_config import PUBLISHED_METHOD, SETTINGS, MemoryConfig
from emt.config.model_config import MODEL_SETTINGS, ModelConfig
from emt.config.setting import Setting, check_names
from emt.config.uncertainty import Uncertainty

__all__ = [
    "MODEL_SETTINGS",
    "PUBLISHED_METHOD",
    "SETTINGS",
    "MemoryConfig",
    "ModelConfig",
    "Setting",
    "Uncertainty",
    "check_names",
]
