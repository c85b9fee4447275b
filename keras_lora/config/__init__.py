"""What to adapt and how: `LoRAConfig` for a model, `AdapterSpec` for one layer of it."""

from keras_lora.config.checking import (
    PRESETS,
    Targets,
    check_names,
    check_start,
    check_targets,
)
from keras_lora.config.lora import BIASES, LoRAConfig, check_settled, is_auto
from keras_lora.config.spec import DEFAULT_INIT, AdapterSpec

__all__ = [
    "BIASES",
    "DEFAULT_INIT",
    "PRESETS",
    "AdapterSpec",
    "LoRAConfig",
    "Targets",
    "check_names",
    "check_settled",
    "check_start",
    "check_targets",
    "is_auto",
]
