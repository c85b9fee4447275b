"""Layers with a frozen kernel and trainable low-rank factors beside it.

A `LoRALayer` is a subclass of the Keras layer that it adapts. It is made in two ways: by its
constructor, like any layer, or by `attach`, which turns a built layer into an adapted one *in
place*: the object and its variables stay the same, only its class changes. `detach` is the
inverse.
"""

from keras_lora.layers.adaptable import (
    WAS_TRAINABLE,
    check_adaptable,
    check_adapter_name,
    remember_flag,
)
from keras_lora.layers.adapter import (
    Adapter,
    LayerAdapter,
    adapter_shapes,
    factor_names,
    layer_adapter,
)
from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.checkpoint import STATE_PREFIX
from keras_lora.layers.computation import computing
from keras_lora.layers.convolution import LoRAConv1D, LoRAConv2D, LoRAConv3D
from keras_lora.layers.depthwise import LoRADepthwiseConv1D, LoRADepthwiseConv2D
from keras_lora.layers.dequantizing import Drift, dequantize, drop_variable, requantize
from keras_lora.layers.effective import with_items
from keras_lora.layers.embedding import LoRAEmbedding, LoRAReversibleEmbedding
from keras_lora.layers.factors import Factor
from keras_lora.layers.groups import group_of, in_group
from keras_lora.layers.kinds import Kind, Site, family_of
from keras_lora.layers.layouts import Layout, layout_of
from keras_lora.layers.linear import LoRADense, LoRAEinsumDense
from keras_lora.layers.lora_layer import DEFAULT_ADAPTER, LoRALayer, plain_class
from keras_lora.layers.mixed_batch import MixedBatch
from keras_lora.layers.owned import (
    BASE,
    OwnedValues,
    add_owner,
    all_owned,
    owned,
    remove_owner,
)
from keras_lora.layers.padding import goes_by_element, parts_of
from keras_lora.layers.quantized import grid_of, pass_gradient, shapes_in_float, stop_gradient
from keras_lora.layers.recomputed import is_recomputed, keep_activations, moves, recompute
from keras_lora.layers.recurrent import (
    LoRAConvLSTMCell,
    LoRAGRUCell,
    LoRALSTMCell,
    LoRASimpleRNNCell,
)
from keras_lora.layers.registry import (
    attach,
    detach,
    factor_matrices,
    is_registered,
    lora_class_for,
    output_gain,
    output_norms,
    register_lora_class,
    site_of,
    sites_of,
    supported_base,
)
from keras_lora.layers.separable import LoRASeparableConv1D, LoRASeparableConv2D
from keras_lora.layers.transposed import (
    LoRAConv1DTranspose,
    LoRAConv2DTranspose,
    LoRAConv3DTranspose,
)
from keras_lora.layers.unlocked import unlocked
from keras_lora.layers.variables import LoRAVariables, check_bare

__all__ = [
    "BASE",
    "DEFAULT_ADAPTER",
    "STATE_PREFIX",
    "WAS_TRAINABLE",
    "Adapter",
    "AdapterBank",
    "Drift",
    "Factor",
    "Kind",
    "LayerAdapter",
    "Layout",
    "LoRAConv1D",
    "LoRAConv1DTranspose",
    "LoRAConv2D",
    "LoRAConv2DTranspose",
    "LoRAConv3D",
    "LoRAConv3DTranspose",
    "LoRAConvLSTMCell",
    "LoRADense",
    "LoRADepthwiseConv1D",
    "LoRADepthwiseConv2D",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRAGRUCell",
    "LoRALSTMCell",
    "LoRALayer",
    "LoRAReversibleEmbedding",
    "LoRASeparableConv1D",
    "LoRASeparableConv2D",
    "LoRASimpleRNNCell",
    "LoRAVariables",
    "MixedBatch",
    "OwnedValues",
    "Site",
    "adapter_shapes",
    "add_owner",
    "all_owned",
    "attach",
    "check_adaptable",
    "check_adapter_name",
    "check_bare",
    "computing",
    "dequantize",
    "detach",
    "drop_variable",
    "factor_matrices",
    "factor_names",
    "family_of",
    "goes_by_element",
    "grid_of",
    "group_of",
    "in_group",
    "is_recomputed",
    "is_registered",
    "keep_activations",
    "layer_adapter",
    "layout_of",
    "lora_class_for",
    "moves",
    "output_gain",
    "output_norms",
    "owned",
    "parts_of",
    "pass_gradient",
    "plain_class",
    "recompute",
    "register_lora_class",
    "remember_flag",
    "remove_owner",
    "requantize",
    "shapes_in_float",
    "site_of",
    "sites_of",
    "stop_gradient",
    "supported_base",
    "unlocked",
    "with_items",
]
