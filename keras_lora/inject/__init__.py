"""Adapting a model and taking the adapters out again: conversions in place."""

from keras_lora.inject.apply import apply_lora
from keras_lora.inject.compiled import around, changing, refresh
from keras_lora.inject.freezing import freeze, original_flag
from keras_lora.inject.merge import adapted, merge_lora, merged, unload_lora

__all__ = [
    "adapted",
    "apply_lora",
    "around",
    "changing",
    "freeze",
    "merge_lora",
    "merged",
    "original_flag",
    "refresh",
    "unload_lora",
]
