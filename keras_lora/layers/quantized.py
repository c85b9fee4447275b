"""Layers that Keras has quantized: their weight in floating point, and the product alone.

    int8            W0 = q / scale                      a scale for each output
    int4            W0 = q / scale                      the same, with two values in a byte
    int4, grouped   W0 = (q - zero[g]) scale[g]         g: the group of an input, 128 by default
    gptq            W0 = (q - zero[g]) scale[g]         as a matrix of outputs and inputs
    awq             W0 = (q - zero[g]) scale[g] / c     c: a scale for each input

The product `x W0` stays Keras's own, which for int8 rounds `x` too. An adapter acts between that
product and the bias.

Private Keras API in this file, and why (`tests/test_private_quantizing.py` watches):
    `_kernel`, `_embeddings`: the integers, which have no public name.
    `_adjust_scale_for_dequant`: the scale of an `EinsumDense`, in the layout of its kernel.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, final

import keras
from keras import ops

from keras_lora.lowrank.equations import EinsumSplit, Shape, Tensor
from keras_lora.lowrank.products import Products, factored_products

Layer: TypeAlias = "keras.layers.Layer"

MODES = ("int8", "int4", "gptq", "awq")
_CALIBRATED = ("gptq", "awq")
_CALL = "quantized_call"
# The attributes of quantized layers that are variables, but for the bias.
MATRICES = ("quantized_kernel", "_kernel", "_embeddings")
VARIABLES = (
    *(*MATRICES, "kernel_scale", "kernel_zero", "awq_scales", "g_idx"),
    *("embeddings_scale", "embeddings_zero"),
    *("reverse_embeddings", "reverse_embeddings_scale", "reverse_embeddings_zero"),
)


def mode_of(layer: Layer) -> str | None:
    """How a layer is quantized; None for a layer in floating point."""
    mode: str | None = layer.dtype_policy.quantization_mode
    return mode


def grid_of(layer: Layer) -> str | None:
    """The mode with what else says how coarse the integers are, such as `"int4/128"`."""
    mode = mode_of(layer)
    name = str(layer.dtype_policy.name).partition("_from_")[0]
    return None if mode is None else name


def integers_of(layer: Layer, attribute: str) -> str:
    """The attribute that is the variable with `W0`, in whatever form."""
    calibrated = mode_of(layer) in _CALIBRATED and "quantized_kernel" in vars(layer)
    return "quantized_kernel" if calibrated else attribute


def is_calibrated(layer: Layer) -> bool:
    """Whether the integers of a layer have values yet, which for some modes come from data."""
    mode = mode_of(layer)
    return mode not in _CALIBRATED or bool(getattr(layer, f"is_{mode}_calibrated", False))


def float_shape(layer: Layer) -> Shape:
    """The shape of `W0` in floating point."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.input_dim, layer.output_dim
    if isinstance(layer, keras.layers.Dense):
        return layer.input_spec.axes[-1], layer.units
    shape = layer._kernel.shape if mode_of(layer) == "int8" else layer.original_kernel_shape
    return tuple(map(int, shape))


def shapes_in_float(layer: Layer) -> dict[int, Shape | None]:
    """By the ids of a layer's variables, the shapes that the layer has in floating point.

    None for variables that it has not then. A layer in floating point gives nothing.
    """
    if mode_of(layer) not in MODES:
        return {}
    own, reverse = vars(layer), "reverse_embeddings"
    found: dict[int, Shape | None] = {id(own[n]): None for n in VARIABLES if n in own}
    if reverse in own:
        found[id(own[reverse])] = (layer.output_dim, layer.input_dim)
    matrix = next(own[n] for n in MATRICES if n in own)
    return found | {id(matrix): float_shape(layer)}


@dataclass(frozen=True, eq=False)
class Integers:
    """What a quantized layer has in the place of `W0`, as tensors of this moment."""

    layer: Layer
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, layer: Layer) -> Integers:
        found = {name: vars(layer)[name] for name in VARIABLES if name in vars(layer)}
        return cls(layer, {name: ops.convert_to_tensor(v) for name, v in found.items()})

    def weight(self, dtype: str) -> Tensor:
        """`W0` in floating point, computed in `dtype`."""
        layer, of = self.layer, partial(self._as, dtype)
        if isinstance(layer, keras.layers.Embedding):
            return self._rows(dtype)
        if mode_of(layer) == "int8":
            scale = of("kernel_scale")
            if isinstance(layer, keras.layers.EinsumDense):
                scale = layer._adjust_scale_for_dequant(scale)
            return of("_kernel") / scale
        matrix = self._columns(dtype) if mode_of(layer) == "int4" else self._calibrated(dtype)
        return ops.reshape(matrix, float_shape(layer))

    def reverse(self, dtype: str) -> Tensor:
        """What a reversible embedding multiplies by in reverse, `(dim, vocabulary)`."""
        layer, name = self.layer, "reverse_embeddings"
        if layer.tie_weights:
            return ops.transpose(self._rows(dtype))
        values = self.tensors[name]
        if mode_of(layer) == "int4":
            values = keras.quantizers.unpack_int4(values, layer.output_dim, axis=0)
        return self._scaled(ops.cast(values, dtype), name, 0, dtype)

    def _rows(self, dtype: str) -> Tensor:
        values = self.tensors["_embeddings"]
        if mode_of(self.layer) == "int4":
            values = keras.quantizers.unpack_int4(values, self.layer.output_dim, axis=-1)
        return self._scaled(ops.cast(values, dtype), "embeddings", -1, dtype)

    def _columns(self, dtype: str) -> Tensor:
        columns = self.tensors["kernel_scale"].shape[-1]
        values = keras.quantizers.unpack_int4(self.tensors["_kernel"], columns, axis=-1)
        return self._scaled(ops.cast(values, dtype), "kernel", 0, dtype)

    def _calibrated(self, dtype: str) -> Tensor:
        """Of integers `(outputs, inputs)`, of which four bits or fewer are two in a byte."""
        values, outputs = self.tensors["quantized_kernel"], self.tensors["kernel_scale"].shape[0]
        if values.shape[0] != outputs:
            values = keras.quantizers.unpack_int4(values, outputs, axis=0, dtype="uint8")
        matrix = ops.transpose(self._scaled(ops.cast(values, dtype), "kernel", -1, dtype))
        if mode_of(self.layer) == "awq":
            matrix = matrix / ops.expand_dims(self._as(dtype, "awq_scales"), -1)
        return matrix

    def _scaled(self, values: Tensor, name: str, axis: int, dtype: str) -> Tensor:
        """The integers on their grid; `axis` is that of the groups."""
        scale = self._as(dtype, f"{name}_scale")
        if f"{name}_zero" not in self.tensors:
            return values / (scale if axis == 0 else ops.expand_dims(scale, -1))
        groups = ops.cast(self.tensors["g_idx"], "int32")
        scale, zero = (
            ops.take(x, groups, axis=axis) for x in (scale, self._as(dtype, f"{name}_zero"))
        )
        return (values - zero) * scale

    def _as(self, dtype: str, name: str) -> Tensor:
        return ops.cast(self.tensors[name], dtype)


def base_product(layer: Any) -> Any:
    """An object whose `quantized_call` is Keras's own, without bias, activation and soft cap."""
    bare = object.__new__(layer.base_class if "_lora" in vars(layer) else type(layer))
    without = {"bias": None, "activation": None, "logit_soft_cap": None}
    bare.__dict__.update(vars(layer) | without)
    bare.__dict__.pop(_CALL, None)
    return bare


def frozen_product(layer: Layer, split: EinsumSplit) -> Callable[[Tensor], Tensor]:
    """Keras's quantized product, with the gradient of the product in floating point.

    y = x W0 (Keras's own)      dx = dy W0^T      W0: made anew in each pass, and not kept
    """
    product = base_product(layer).quantized_call
    if set(split.input) - set(split.output) - set(split.kernel):
        return product  # an axis is summed away without the kernel: no einsum has this gradient
    backwards = f"{split.output},{split.kernel}->{split.input}"

    def transposed(dy: Tensor) -> Tensor:
        return ops.einsum(backwards, dy, Integers.of(layer).weight(dy.dtype))

    return partial(_multiplied, product, transposed)


def reverse_product(layer: Layer, inputs: Tensor) -> Tensor:
    """Keras's quantized product in reverse, with the gradient of the product in floating point.

    Keras rounds the inputs to integers, through which no gradient passes: what is left of it is
    that of their scale, which depends on the largest input alone.
    """

    def transposed(dy: Tensor) -> Tensor:
        return ops.matmul(dy, ops.transpose(Integers.of(layer).reverse(dy.dtype)))

    product = partial(base_product(layer).quantized_call, reverse=True)
    return _multiplied(product, transposed, inputs)


def _multiplied(
    product: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], inputs: Tensor
) -> Tensor:
    """A product with a gradient of its own."""

    @ops.custom_gradient
    def multiplied(x: Tensor) -> Any:
        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor]:
            dy = args[0] if upstream is None else upstream
            with _after(dy):
                return (ops.cast(transposed(dy), x.dtype),)

        with _after(x):
            return product(x), gradient

    return multiplied(inputs)


def _after(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """On TensorFlow nothing within is computed before `x` is.

    A graph computes at once what depends on variables alone: all matrices of a model would be in
    floating point when a step begins, and be kept until it ends.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    return importlib.import_module("tensorflow").control_dependencies([x])


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """`cap tanh(y / cap)`, in Keras's order."""
    return logits if cap is None else ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)


def pass_gradient(layer: Layer) -> None:
    """Let a plain reversible embedding, if it is quantized, have the gradient in reverse too."""
    if isinstance(layer, keras.layers.ReversibleEmbedding) and mode_of(layer) in MODES:
        vars(layer)[_CALL] = partial(_reversible_call, layer)


def stop_gradient(layer: Layer) -> None:
    """The inverse of `pass_gradient`."""
    vars(layer).pop(_CALL, None)


def _reversible_call(layer: Any, inputs: Tensor, reverse: bool = False) -> Tensor:
    if not reverse:
        return base_product(layer).quantized_call(inputs)
    return capped(reverse_product(layer, inputs), layer.logit_soft_cap)


@final
class Quantized(Products):
    """The products of a quantized matrix: `x W0` is Keras's own, `(x A) B` as everywhere."""

    def __init__(
        self, product: Callable[[Tensor], Tensor], split: EinsumSplit, shape: Shape
    ) -> None:
        self._product, self._factored = product, factored_products(split, shape)

    def base(self, x: Tensor) -> Tensor:
        return self._product(x)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self._factored.update(x, a, b)

    def times_gain(self, product: Tensor, gain: Tensor) -> Tensor:
        return self._factored.times_gain(product, gain)
