"""Which class adapts which, and the conversion of a built layer in place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.layers.adapter import LayerAdapter
from keras_lora.layers.converting import become, convert
from keras_lora.layers.convolution import LoRAConv1D, LoRAConv2D, LoRAConv3D
from keras_lora.layers.depthwise import LoRADepthwiseConv1D, LoRADepthwiseConv2D
from keras_lora.layers.embedding import LoRAEmbedding, LoRAReversibleEmbedding
from keras_lora.layers.kinds import CONV_LSTM_CELL, KINDS, Kind, Site, kinds_of, only
from keras_lora.layers.linear import LoRADense, LoRAEinsumDense
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.recurrent import (
    LoRAConvLSTMCell,
    LoRAGRUCell,
    LoRALSTMCell,
    LoRASimpleRNNCell,
)
from keras_lora.layers.separable import LoRASeparableConv1D, LoRASeparableConv2D
from keras_lora.layers.state import LoRAState
from keras_lora.layers.transposed import (
    LoRAConv1DTranspose,
    LoRAConv2DTranspose,
    LoRAConv3DTranspose,
)
from keras_lora.layers.variables import LoRAVariables, bare_sites, variables_class

_LORA_CLASSES: dict[type, type[LoRALayer]] = {
    keras.layers.Dense: LoRADense,
    keras.layers.EinsumDense: LoRAEinsumDense,
    keras.layers.Embedding: LoRAEmbedding,
    keras.layers.ReversibleEmbedding: LoRAReversibleEmbedding,
    keras.layers.Conv1D: LoRAConv1D,
    keras.layers.Conv2D: LoRAConv2D,
    keras.layers.Conv3D: LoRAConv3D,
    keras.layers.Conv1DTranspose: LoRAConv1DTranspose,
    keras.layers.Conv2DTranspose: LoRAConv2DTranspose,
    keras.layers.Conv3DTranspose: LoRAConv3DTranspose,
    keras.layers.DepthwiseConv1D: LoRADepthwiseConv1D,
    keras.layers.DepthwiseConv2D: LoRADepthwiseConv2D,
    keras.layers.LSTMCell: LoRALSTMCell,
    keras.layers.GRUCell: LoRAGRUCell,
    keras.layers.SimpleRNNCell: LoRASimpleRNNCell,
    CONV_LSTM_CELL: LoRAConvLSTMCell,
    keras.layers.SeparableConv1D: LoRASeparableConv1D,
    keras.layers.SeparableConv2D: LoRASeparableConv2D,
}


def register_lora_class(
    layer_class: type, lora_class: type[LoRALayer], kind: Kind | None = None
) -> None:
    """Say how a layer class of your own is adapted.

    Needed for a subclass of `Dense`, `EinsumDense` or an embedding that overrides `call`, whose
    computation this package does not know. `lora_class` repeats that computation, with
    `self.adapted_product(inputs, training)` in the place of `inputs @ kernel`. For an embedding,
    derive it from `LoRAEmbedding` and `layer_class` and call `self.adapted_lookup(inputs)`.

    Args:
        layer_class: The class to adapt.
        lora_class: A subclass of both `LoRALayer` and `layer_class`.
        kind: Its `keras_lora.layers.Kind`, for a class that is no `Dense`, `EinsumDense` or
            embedding.

    Raises:
        ValueError: `lora_class` is not a subclass of both, or has no kind.

    Example:

    >>> import keras
    >>> from keras import ops
    >>> class Doubled(keras.layers.Dense):
    ...     def call(self, inputs, training=None):
    ...         return 2 * ops.matmul(inputs, self.kernel)
    >>> class LoRADoubled(LoRALayer, Doubled):
    ...     @staticmethod
    ...     def kernel_equation(layer):
    ...         return "...x,xy->...y"
    ...     def call(self, inputs, training=None):
    ...         return 2 * self.adapted_product(inputs, training)
    >>> register_lora_class(Doubled, LoRADoubled)
    """
    if not issubclass(lora_class, LoRALayer) or not issubclass(lora_class, layer_class):
        raise invalid(
            "lora_class", f"a subclass of LoRALayer and of {layer_class.__name__}", lora_class
        )
    if kind is not None:
        KINDS[layer_class] = {"": kind}
    if not kinds_of(lora_class):
        raise invalid(
            "kind", f"the kind of {layer_class.__name__}", kind, "pass a keras_lora.layers.Kind"
        )
    _LORA_CLASSES[layer_class] = lora_class
    lora_class_for.cache_clear()


@cache
def lora_class_for(layer_class: Any) -> type[LoRALayer] | None:
    """The class that a layer of `layer_class` is converted to, or None.

    A subclass that keeps the computation of its registered base gets a class made for it, so
    that its own methods stay.
    """
    base = supported_base(layer_class)
    if base is None or overrides(layer_class, base):
        return None
    lora_class = _LORA_CLASSES[base]
    if layer_class is base:
        return lora_class
    return type(f"LoRA{layer_class.__name__}", (lora_class, layer_class), {})


# The attributes of a class that say what its layers compute.
_COMPUTATION = (
    "call",
    "convolution_op",
    "quantized_call",
    "kernel",
    "recurrent_kernel",
    "embeddings",
)


def overrides(layer_class: type, base: type) -> bool:
    """Whether a class overrides the computation of its base."""
    return any(
        getattr(layer_class, name, None) is not getattr(base, name, None) for name in _COMPUTATION
    )


def supported_base(layer_class: type) -> type | None:
    """The nearest class of the registry that `layer_class` descends from."""
    return next((c for c in layer_class.__mro__ if c in _LORA_CLASSES), None)


def attach(layer: keras.layers.Layer, state: LoRAState | None = None) -> LoRALayer:
    """Turn a built layer into an adapted one in place, with the adapters of `state` or none."""
    layer_class: Any = type(layer)
    return convert(layer, lora_class_for(layer_class) or variables_class(layer), state)


def detach(layer: LoRALayer) -> LoRAState:
    """The inverse of `attach`: the plain layer again. The returned state contains the adapters."""
    state = layer._lora
    for bank in state.banks.values():
        bank.untrack()
    del layer._lora
    become(layer, state.base_class)
    if state.quantize is not None:
        layer.__dict__["quantize"] = state.quantize
    return state


def sites_of(layer: keras.layers.Layer) -> Mapping[str, Site]:
    """The matrices of a layer that can be adapted, by name, whether they are adapted or not."""
    if isinstance(layer, LoRALayer):
        return {name: bank.site for name, bank in layer.banks.items()}
    layer_class: Any = type(layer)
    lora_class: Any = lora_class_for(layer_class)
    if lora_class is None:
        return bare_sites(layer)
    return {name: Site(layer, kind, name) for name, kind in kinds_of(lora_class).items()}


def site_of(layer: keras.layers.Layer) -> Site:
    """The only matrix of a layer.

    Raises:
        ValueError: the layer has several, or none.
    """
    return only(sites_of(layer), layer)


def output_norms(site: Site, adapter: LayerAdapter | None = None) -> np.ndarray:
    """`|W0|` of each output or, with an adapter, `|W0 + s A B|`, in float32."""
    split, kernel = site.split(), site.wide_matrix()
    if adapter is not None:
        factors = (ops.cast(np.array(factor), kernel.dtype) for factor in adapter.factors[:2])
        kernel = kernel + adapter.scaling * split.delta(*factors)
    return ops.convert_to_numpy(ops.sqrt(split.squared_norms(kernel))).astype("float32")


def output_gain(site: Site, adapter: LayerAdapter) -> np.ndarray:
    """`g = m / |W0 + s A B|` of each output, for an adapter with DoRA, in float32."""
    split, kernel = site.split(), site.wide_matrix()
    a, b, m = (ops.cast(np.array(factor), kernel.dtype) for factor in adapter.factors)
    gain = split.gain(kernel, split.squared_norms(kernel), a, adapter.scaling * b, m)
    return ops.convert_to_numpy(gain).astype("float32")


def factor_matrices(site: Site, adapter: LayerAdapter) -> tuple[np.ndarray, np.ndarray]:
    """`A` and `B` of an adapter of the site, as `(shared, d, r)` and `(shared, r, k)`."""
    return site.split().matrices(np.array(adapter.a), np.array(adapter.b), site.shape)


def is_registered(layer: LoRALayer) -> bool:
    """Whether Keras can find the layer's class by name when it reads a file."""
    if isinstance(layer, LoRAVariables):
        return layer.is_listed
    return type(layer) in _LORA_CLASSES.values()
