"""LoRA for Keras 3: adapt, `fit`, merge, serve."""

from keras_lora.adapters import delete_adapter, disable_adapter, scale_adapter, set_adapter
from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.export import GraphReport, check_saved_model, export_saved_model
from keras_lora.inject import apply_lora, merge_lora, merged, unload_lora
from keras_lora.layers import LoRADense, LoRAEinsumDense, LoRALayer, register_lora_class
from keras_lora.summary import LoRASummary, lora_summary
from keras_lora.walker import Target, find_targets, lora_layers

__version__ = "0.1.0"

__all__ = [
    "AdapterSpec",
    "GraphReport",
    "LoRAConfig",
    "LoRADense",
    "LoRAEinsumDense",
    "LoRALayer",
    "LoRASummary",
    "Target",
    "apply_lora",
    "check_saved_model",
    "delete_adapter",
    "disable_adapter",
    "export_saved_model",
    "find_targets",
    "lora_layers",
    "lora_summary",
    "merge_lora",
    "merged",
    "register_lora_class",
    "scale_adapter",
    "set_adapter",
    "unload_lora",
]
