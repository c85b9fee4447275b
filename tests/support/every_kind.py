"""A layer of each kind, beside each other in one model, and the gradients that its steps take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import layers, ops

import keras_lora as kl
from support.hlo import sums_over
from support.variables import MIXTURES

ROWS = 23  # no other dimension is a multiple of it
TOKENS = ("embedding", "tied", "untied")
Shape = tuple[int, ...]
Make = Callable[..., keras.layers.Layer]


def of(layer_class: type, *args: Any, **options: Any) -> Make:
    def make(name: str) -> keras.layers.Layer:
        layer = layer_class(*args, name=name, **options)
        # JAX would compile a program for the random values of each shape.
        for each in layer._flatten_layers():
            for attribute in [x for x in vars(each) if x.endswith("kernel_initializer")]:
                setattr(each, attribute, _drawn)
        return layer

    return make


def _drawn(shape: Shape, dtype: Any = None) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(dtype)


EINSUM, REVERSIBLE = layers.EinsumDense, layers.ReversibleEmbedding
KINDS: Mapping[str, tuple[Shape, Make]] = MappingProxyType(
    {
        "dense": ((7,), of(layers.Dense, 11)),
        "query": ((13, 7), of(EINSUM, "btd,dnh->btnh", (13, 3, 5))),
        "output": ((13, 3, 5), of(EINSUM, "btnh,nhd->btd", (13, 19))),
        "by_index": ((3, 7), of(EINSUM, "bed,edf->bef", (3, 13))),
        "embedding": ((7,), of(layers.Embedding, 29, 7)),
        "tied": ((7,), of(REVERSIBLE, 31, 7)),
        "untied": ((7,), of(REVERSIBLE, 37, 7, tie_weights=False)),
        # Large enough that gradients of their factors alone cost less than that of the kernel.
        "convolution": ((13, 19), of(layers.Conv1D, 31, 3)),
        "grouped": ((7, 5, 34), of(layers.Conv2D, 38, (3, 2), groups=2)),
        "pointwise": ((7, 31), of(layers.Conv1D, 43, 1)),
        "transposed": ((5, 17), of(layers.Conv1DTranspose, 31, 3)),
        "depthwise": ((7, 5, 7), of(layers.DepthwiseConv2D, (3, 2), depth_multiplier=5)),
        "separable": ((13, 29), of(layers.SeparableConv1D, 41, 3)),
        "lstm": ((5, 7), of(layers.LSTM, 3)),
        "gru": ((5, 11), of(layers.GRU, 7)),
        "simple": ((5, 13), of(layers.SimpleRNN, 17)),
        "conv_lstm": ((5, 7, 11), of(layers.ConvLSTM1D, 3, 3)),
        "mixture": ((7, 5), MIXTURES["mixtral"]),
        "positions": ((7, 5), of(keras_hub.layers.PositionEmbedding, 7)),
    }
)
_GATES = 4  # of a convolutional cell, each with a gradient of its own


def beside(names: Iterable[str] = tuple(KINDS)) -> keras.Model:
    """The layers of these names, each with inputs of its own."""
    inputs, losses = [], []
    for name in names:
        shape, make = KINDS[name]
        dtype = "int32" if name in TOKENS else "float32"
        inputs.append(keras.Input(shape, dtype=dtype, name=f"{name}_inputs"))
        layer = make(name=name)
        y = layer(inputs[-1])
        if name in TOKENS[1:]:
            y = layer(y, reverse=True)
        losses.append(ops.mean(ops.square(y), tuple(range(1, len(y.shape)))))
    model = keras.Model(inputs, layers.Add()(losses), name="beside")
    model.compile("sgd", "mse", jit_compile=True)
    return model


def batch(model: keras.Model) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    rng = np.random.default_rng(5)
    x = (rng.integers(0, 29, (ROWS, *i.shape[1:])).astype(i.dtype) for i in model.inputs)
    return tuple(x), np.zeros(ROWS, "float32")


def matrices(model: keras.Model, targets: Any) -> dict[str, int]:
    """The number of values of each matrix, by path."""
    return {t.path: math.prod(t.site.matrix.shape) for t in kl.find_targets(model, targets)}


def with_gradients(sizes: Mapping[str, int], text: str) -> set[str]:
    """The matrices that a step takes a gradient of which is as large as they are."""
    found = {math.prod(shape) for _, shape in sums_over(ROWS, text)}
    parts = {path: size // _GATES if "conv_lstm" in path else size for path, size in sizes.items()}
    return {path for path, size in parts.items() if size in found}
