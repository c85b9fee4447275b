"""Which class adapts which, and the conversion of a built layer in place."""

from __future__ import annotations

from functools import cache
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.layers.embedding import LoRAEmbedding, LoRAReversibleEmbedding
from keras_lora.layers.kinds import wide_kernel
from keras_lora.layers.linear import LoRADense, LoRAEinsumDense
from keras_lora.layers.lora_layer import LoRALayer, plain_class
from keras_lora.layers.slots import LayerAdapter
from keras_lora.layers.state import LoRAState
from keras_lora.lowrank.equations import EinsumSplit, split_equation

_LORA_CLASSES: dict[type, type[LoRALayer]] = {
    keras.layers.Dense: LoRADense,
    keras.layers.EinsumDense: LoRAEinsumDense,
    keras.layers.Embedding: LoRAEmbedding,
    keras.layers.ReversibleEmbedding: LoRAReversibleEmbedding,
}


def register_lora_class(layer_class: type, lora_class: type[LoRALayer]) -> None:
    """Say how a layer class of your own is adapted.

    Needed for a subclass of `Dense`, `EinsumDense` or an embedding that overrides `call`: what
    it computes is not known here. `lora_class` repeats that computation with
    `self.adapted_product(inputs, training)` in the place of `inputs @ kernel`. One of
    `LoRAEmbedding` and `layer_class` does so with `self.adapted_lookup(inputs)`.

    Args:
        layer_class: The class to adapt.
        lora_class: A subclass of both `LoRALayer` and `layer_class`.

    Raises:
        ValueError: `lora_class` is not a subclass of both.

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


def overrides(layer_class: type, base: type) -> bool:
    """Whether a class computes something else than its base does."""
    return any(
        getattr(layer_class, name, None) is not getattr(base, name, None)
        for name in ("call", "quantized_call", "kernel", "embeddings")
    )


def supported_base(layer_class: type) -> type | None:
    """The nearest class of the registry that `layer_class` descends from."""
    return next((c for c in layer_class.__mro__ if c in _LORA_CLASSES), None)


def attach(layer: keras.layers.Layer, state: LoRAState | None = None) -> LoRALayer:
    """Turn a built layer into an adapted one in place, with the adapters of `state` or none."""
    layer._lora = LoRAState(base_class=type(layer)) if state is None else state
    layer_class: Any = type(layer)
    layer.__class__ = lora_class_for(layer_class)
    layer._track_adapters()
    return layer


def detach(layer: LoRALayer) -> LoRAState:
    """The inverse of `attach`: the plain layer again. The adapters are in what is returned."""
    state = layer._lora
    layer._untrack_adapters()
    del layer._lora
    layer.__class__ = state.base_class
    return state


def split_kernel(layer: keras.layers.Layer) -> EinsumSplit:
    """How a layer that can be adapted is factored.

    Raises:
        ValueError: its equation has a diagonal.
    """
    lora_class: Any = lora_class_for(plain_class(layer))
    return split_equation(lora_class.kernel_equation(layer))


def output_norms(layer: keras.layers.Layer, adapter: LayerAdapter | None = None) -> np.ndarray:
    """`|W0|` of each output or, with an adapter, `|W0 + s A B|`, in float32."""
    split, kernel = split_kernel(layer), wide_kernel(layer)
    if adapter is not None:
        factors = (ops.cast(np.array(factor), kernel.dtype) for factor in adapter.factors[:2])
        kernel = kernel + adapter.scaling * split.delta(*factors)
    return ops.convert_to_numpy(ops.sqrt(split.squared_norms(kernel))).astype("float32")


def output_gain(layer: keras.layers.Layer, adapter: LayerAdapter) -> np.ndarray:
    """`g = m / |W0 + s A B|` of each output, for an adapter with DoRA, in float32."""
    split, kernel = split_kernel(layer), wide_kernel(layer)
    a, b, m = (ops.cast(np.array(factor), kernel.dtype) for factor in adapter.factors)
    gain = split.gain(kernel, split.squared_norms(kernel), a, adapter.scaling * b, m)
    return ops.convert_to_numpy(gain).astype("float32")


def is_registered(layer: LoRALayer) -> bool:
    """Whether Keras can find the layer's class by name when it reads a file."""
    return type(layer) in _LORA_CLASSES.values()
