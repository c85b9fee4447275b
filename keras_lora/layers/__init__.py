"""Layers with a frozen kernel and trainable low-rank factors beside it.

A `LoRALayer` is a subclass of the Keras layer that it adapts. It is made in two ways: by its
constructor, as any layer, or by `attach`, which turns a built layer into an adapted one *in
place*: the object and its variables stay the same, only its class changes. `detach` is the
inverse.
"""

from keras_lora.layers.base import (
    DEFAULT_ADAPTER,
    WAS_TRAINABLE,
    LoRALayer,
    check_adaptable,
    check_adapter_name,
    plain_class,
    remember_flag,
)
from keras_lora.layers.embedding import LoRAEmbedding, LoRAReversibleEmbedding
from keras_lora.layers.held import BASE, Held, all_held, forget, held, hold, release
from keras_lora.layers.linear import LoRADense, LoRAEinsumDense
from keras_lora.layers.matrix import base_kernel, bias_of, is_table, kernel_shape
from keras_lora.layers.registry import (
    attach,
    detach,
    is_registered,
    lora_class_for,
    output_gain,
    output_norms,
    register_lora_class,
    split_kernel,
    supported_base,
)
from keras_lora.layers.rows import Rows
from keras_lora.layers.slots import Adapter, Factor, Group, adapter_shapes, factor_names

__all__ = [
    "BASE",
    "DEFAULT_ADAPTER",
    "WAS_TRAINABLE",
    "Adapter",
    "Factor",
    "Group",
    "Held",
    "LoRADense",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRAReversibleEmbedding",
    "Rows",
    "adapter_shapes",
    "all_held",
    "attach",
    "base_kernel",
    "bias_of",
    "check_adaptable",
    "check_adapter_name",
    "detach",
    "factor_names",
    "forget",
    "held",
    "hold",
    "is_registered",
    "is_table",
    "kernel_shape",
    "lora_class_for",
    "output_gain",
    "output_norms",
    "plain_class",
    "register_lora_class",
    "release",
    "remember_flag",
    "split_kernel",
    "supported_base",
]
