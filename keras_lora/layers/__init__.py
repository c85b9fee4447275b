"""Layers with a frozen kernel and trainable low-rank factors beside it.

A `LoRALayer` is a subclass of the Keras layer that it adapts. It is made in two ways: by its
constructor, as any layer, or by `attach`, which turns a built layer into an adapted one *in
place*: the object and its variables stay the same, only its class changes. `detach` is the
inverse.
"""

from keras_lora.layers.embedding import LoRAEmbedding, LoRAReversibleEmbedding
from keras_lora.layers.kinds import base_kernel, bias_of, is_table, kernel_shape
from keras_lora.layers.linear import LoRADense, LoRAEinsumDense
from keras_lora.layers.lora_layer import (
    DEFAULT_ADAPTER,
    WAS_TRAINABLE,
    LoRALayer,
    check_adaptable,
    check_adapter_name,
    plain_class,
    remember_flag,
)
from keras_lora.layers.owned import (
    BASE,
    OwnedValues,
    add_owner,
    all_owned,
    forget_owners,
    owned,
    remove_owner,
)
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
from keras_lora.layers.slots import Adapter, Factor, LayerAdapter, adapter_shapes, factor_names

__all__ = [
    "BASE",
    "DEFAULT_ADAPTER",
    "WAS_TRAINABLE",
    "Adapter",
    "Factor",
    "LayerAdapter",
    "LoRADense",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRAReversibleEmbedding",
    "OwnedValues",
    "Rows",
    "adapter_shapes",
    "add_owner",
    "all_owned",
    "attach",
    "base_kernel",
    "bias_of",
    "check_adaptable",
    "check_adapter_name",
    "detach",
    "factor_names",
    "forget_owners",
    "is_registered",
    "is_table",
    "kernel_shape",
    "lora_class_for",
    "output_gain",
    "output_norms",
    "owned",
    "plain_class",
    "register_lora_class",
    "remember_flag",
    "remove_owner",
    "split_kernel",
    "supported_base",
]
