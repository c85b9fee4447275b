"""Models of sizes that 8 devices divide, and how `keras.distribution` splits them on a mesh."""

from __future__ import annotations

from typing import Any

import keras
from keras import distribution, ops

TOKENS, LENGTH = 40, 8
Distribution = Any


class Own(keras.layers.Layer):
    """A layer with a bare variable."""

    def build(self, input_shape: Any) -> None:
        self.mixing = self.add_weight(shape=(input_shape[-1], 24), name="mixing")
        self.built = True

    def call(self, inputs: Any) -> Any:
        return ops.matmul(inputs, self.mixing)


def einsum(equation: str, shape: Any, name: str) -> keras.layers.Layer:
    return keras.layers.EinsumDense(equation, shape, name=name)


def chained(layers: list[keras.layers.Layer]) -> keras.Model:
    x = inputs = keras.Input((LENGTH,), dtype="int32")
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x, name="chained")


def small() -> keras.Model:
    layers = [
        keras.layers.Embedding(TOKENS, 16, name="tokens"),
        einsum("btd,dnh->btnh", (LENGTH, 8, 24), "query"),
        einsum("btnh,nhd->bd", (16,), "output"),
        keras.layers.Dense(48, use_bias=False, activation="tanh", name="up"),
        keras.layers.Dense(8, name="head"),
    ]
    return chained(layers)


def every_kind() -> keras.Model:
    """A layer of each family and form, of sizes that 8 devices divide."""
    layers = [
        keras.layers.ReversibleEmbedding(TOKENS, 16, name="tokens"),
        einsum("btd,dnh->btnh", (LENGTH, 8, 24), "query"),
        einsum("btnh,nhd->btd", (LENGTH, 16), "output"),
        einsum("bed,edf->bef", (LENGTH, 24), "experts"),
        keras.layers.LayerNormalization(name="norm"),
        keras.layers.Conv1D(32, 3, padding="same", name="convolution"),
        keras.layers.Conv1DTranspose(16, 3, padding="same", name="transposed"),
        keras.layers.DepthwiseConv1D(3, depth_multiplier=4, name="depthwise", padding="same"),
        keras.layers.SeparableConv1D(24, 3, depth_multiplier=2, padding="same", name="separable"),
        keras.layers.LayerNormalization(name="norm_2"),
        keras.layers.GRU(16, return_sequences=True, name="gru"),
        Own(name="own"),
        keras.layers.Dense(48, use_bias=False, name="up"),
        keras.layers.LSTM(8, name="lstm"),
        keras.layers.Dense(8, name="head"),
    ]
    return chained(layers)


# Of each matrix the axes that it is split over, and then those of its A and B. The keys of a map
# match kernels alone, or every variable of a layer.
Axes = tuple[Any, ...]
B, M = "batch", "model"
LAYOUTS: dict[str, tuple[str, Axes, Axes, Axes]] = {
    "tokens": (".*tokens/embeddings", (M, B), (M, None), (None, B)),
    "query": (".*query/kernel", (B, M, None), (B, None), (None, M, None)),
    "output": (".*output/kernel", (M, None, B), (M, None, None), (None, B)),
    "experts": (".*experts/kernel", (M, None, B), (M, None, None), (M, None, B)),
    "convolution": (".*convolution/kernel", (None, B, M), (None, B, None), (None, M)),
    "transposed": (".*transposed/kernel", (None, B, M), (None, M, None), (None, B)),
    "depthwise": (".*depthwise/kernel", (None, M, None), (None, None), (None, M, None)),
    "separable/pointwise_kernel": (
        ".*pointwise_kernel",
        (None, M, B),
        (None, M, None),
        (None, B),
    ),
    "gru/gru_cell/kernel": (".*gru_cell/kernel", (B, M), (B, None), (None, M)),
    "gru/gru_cell/recurrent_kernel": (".*gru.*recurrent_kernel", (M, B), (M, None), (None, B)),
    "lstm/lstm_cell/kernel": (".*lstm_cell/kernel", (None, M), (None, None), (None, M)),
    "own/mixing": (".*own/mixing", (B, M), (B, None), (None, M)),
    "up": (".*up/.*", (B, M), (B, None), (None, M)),
}


def mesh(*shape: int) -> Distribution:
    devices = distribution.DeviceMesh(shape, (B, M))
    layouts = distribution.LayoutMap(devices)
    for key, axes, _, _ in LAYOUTS.values():
        layouts[key] = axes
    return distribution.ModelParallel(layout_map=layouts, batch_dim_name=B)
