"""From a quantized layer to one in floating point, and to the same mode with other values.

Private Keras API in this file, and why (`tests/test_private_quantizing.py` watches):
    `_kernel`, `_embeddings`, `_is_quantized`, `is_gptq_calibrated`, `is_awq_calibrated`: what
        `layer.quantize` sets, which has no inverse.
    `_track_variable`, `_untrack_variable`: a variable takes the place of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.layers.adaptable import WAS_TRAINABLE
from keras_lora.layers.quantized import VARIABLES, Integers, grid_of, mode_of
from keras_lora.layers.unlocked import unlocked
from keras_lora.lowrank.equations import Tensor

_REVERSE = "reverse_embeddings"


@dataclass(frozen=True)
class Drift:
    """What rounding a merged matrix to integers anew changed in it.

        largest = max |Q - W|        relative = |Q - W| / |W|        W = W0 + s A B

    Attributes:
        largest: The largest change of a weight.
        relative: The norm of the change, relative to the norm of the matrix.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model.quantize("int8", filters="up")
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> drift = {}
    >>> model = kl.merge_lora(model, quantized="requantize", drift=drift)
    >>> drift["up"].relative < 0.01
    True
    """

    largest: float
    relative: float


def dequantize(layer: Any, weight: Tensor) -> None:
    """Give a plain quantized layer this weight in floating point: the inverse of `quantize`."""
    name = "embeddings" if isinstance(layer, keras.layers.Embedding) else "kernel"
    values = {name: (f"_{name}", weight)}
    if _REVERSE in vars(layer):
        values[_REVERSE] = (_REVERSE, Integers.of(layer).reverse("float32"))
    with unlocked(layer):
        for attribute in [a for a in VARIABLES if a in vars(layer)]:
            drop_variable(layer, attribute)
        layer.dtype_policy = layer.dtype_policy.get_config()["source_name"]
        layer._is_quantized = layer.is_gptq_calibrated = layer.is_awq_calibrated = False
        layer.quantization_config = None
        for given, (attribute, value) in values.items():
            setattr(layer, attribute, _added(layer, given, name, value))
        _put_last(layer, getattr(layer, "bias", None))


def requantize(layer: Any, weight: Tensor) -> Drift:
    """Give a plain quantized layer the values nearest to this weight, in the same mode."""
    if mode_of(layer) in ("gptq", "awq"):
        _assign_nearest(layer, np.array(ops.convert_to_numpy(weight), "float64"))
    else:
        config, kept = _config(layer), {v: vars(layer).get(v) for v in VARIABLES if _REVERSE in v}
        values = {name: np.array(v) for name, v in kept.items() if v is not None}
        dequantize(layer, weight)
        layer.quantize(config=config, type_check=False)
        for name, value in values.items():
            getattr(layer, name).assign(value)
    wide = ops.cast(weight, "float32")
    change = ops.convert_to_numpy(Integers.of(layer).weight("float32") - wide).astype("float64")
    norm = np.linalg.norm(ops.convert_to_numpy(wide).astype("float64"))
    return Drift(float(np.abs(change).max()), float(np.linalg.norm(change) / (norm or 1.0)))


def drop_variable(layer: Any, attribute: str) -> None:
    """Take a variable from a layer whose tracker is unlocked."""
    layer._untrack_variable(vars(layer)[attribute])
    # `Layer.__delattr__` collects garbage each time, which for a large model takes minutes.
    super(keras.layers.Layer, layer).__delattr__(attribute)


def _added(layer: Any, name: str, options: str, value: Tensor) -> keras.Variable:
    variable = layer.add_weight(
        name=name,
        shape=tuple(value.shape),
        initializer=lambda _, dtype: ops.cast(value, dtype),
        regularizer=getattr(layer, f"{options}_regularizer"),
    )
    variable.trainable = bool(getattr(layer, WAS_TRAINABLE, layer.trainable))
    return variable


def _put_last(layer: Any, bias: keras.Variable | None) -> None:
    """Keras lists the kernel of a layer before its bias."""
    if bias is None:
        return
    flag = bias.trainable
    bias.trainable = True  # otherwise Keras lists it as non-trainable
    layer._untrack_variable(bias)
    layer._track_variable(bias)
    bias.trainable = flag


def _config(layer: Any) -> Any:
    """What `layer.quantize` was told, or what the policy of a loaded layer says of it."""
    if layer.quantization_config is not None:
        return layer.quantization_config
    if mode_of(layer) == "int8":
        return keras.quantizers.Int8QuantizationConfig()
    size = int(str(grid_of(layer)).partition("/")[2] or -1)
    return keras.quantizers.Int4QuantizationConfig(block_size=None if size == -1 else size)


def _assign_nearest(layer: Any, weight: np.ndarray) -> None:
    """The nearest values of a grid for each output and group, from its least to its largest weight.

    The calibration of the mode, which minds the inputs, needs its data again.
    """
    groups = np.array(layer.g_idx).astype("int64")
    matrix = weight.reshape(len(groups), -1)  # (inputs, outputs)
    if mode_of(layer) == "awq":
        matrix = matrix * np.array(layer.awq_scales, "float64")[:, None]
    bits = 4 if mode_of(layer) == "awq" else int(str(grid_of(layer)).split("/")[1])
    top, scales = 2**bits - 1, np.array(layer.kernel_scale, "float64")
    zeros = np.zeros_like(scales)
    for group in np.unique(groups):
        rows = matrix[groups == group]
        least, most = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        scales[:, group] = np.where(most > least, (most - least) / top, 1.0)
    layer.kernel_scale.assign(scales)
    scales = np.array(layer.kernel_scale, "float64")  # as they are rounded
    for group in np.unique(groups):
        least = np.minimum(matrix[groups == group].min(0), 0)
        zeros[:, group] = np.clip(np.round(-least / scales[:, group]), 0, top)
    values = np.round(matrix.T / scales[:, groups]) + zeros[:, groups]
    packed = np.clip(values, 0, top).astype("uint8")
    if layer.quantized_kernel.shape[0] != len(packed):
        packed, _, _ = keras.quantizers.pack_int4(packed, axis=0, dtype="uint8")
    layer.kernel_zero.assign(zeros)
    layer.quantized_kernel.assign(packed)
