"""Convolutions in float64 NumPy, of an input with its channels last, without bias."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

Layer = Any  # a convolution of Keras, for its strides, padding, dilation and groups


def patches(layer: Layer, x: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """`(batch, *output, *kernel, channels)`."""
    for axis, side in enumerate(size):
        stride, dilation = layer.strides[axis], layer.dilation_rate[axis]
        width, length = (side - 1) * dilation + 1, x.shape[1 + axis]
        total = {
            "valid": 0,
            "causal": width - 1,
            "same": max((-(-length // stride) - 1) * stride + width - length, 0),
        }[layer.padding]
        before = total if layer.padding == "causal" else total // 2
        pad = [(0, 0)] * x.ndim
        pad[1 + axis] = before, total - before
        x = np.pad(x, pad)
    for axis, side in enumerate(size):
        stride, dilation = layer.strides[axis], layer.dilation_rate[axis]
        starts = np.arange(0, x.shape[1 + axis] - (side - 1) * dilation, stride)
        taken = starts[:, None] + np.arange(side) * dilation
        x = np.moveaxis(np.take(x, taken, 1 + axis), 2 + axis, -2)
    return x


def convolved(layer: Layer, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    space, groups, sides = "uvw"[: layer.rank], layer.groups, kernel.ndim - 2
    inputs = np.split(patches(layer, x, kernel.shape[:sides]), groups, -1)
    kernels = np.split(kernel, groups, -1)
    pairs = zip(inputs, kernels, strict=True)
    return np.concatenate([np.einsum(f"...{space}x,{space}xy", i, k) for i, k in pairs], -1)


def depthwise(layer: Layer, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    space = "uvw"[: layer.rank]
    y = np.einsum(f"...{space}c,{space}cm->...cm", patches(layer, x, kernel.shape[:-2]), kernel)
    return y.reshape(*y.shape[:-2], -1)


def transposed(layer: Layer, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """With `padding="valid"`: each input adds its kernel to the outputs from its own place on."""
    assert layer.padding == "valid"
    spread, axes = layer.strides, range(layer.rank)
    size, filters = kernel.shape[:-2], kernel.shape[-2]
    reach = [(size[i] - 1) * layer.dilation_rate[i] for i in axes]
    shape = [(x.shape[1 + i] - 1) * spread[i] + max(reach[i] + 1, spread[i]) for i in axes]
    y = np.zeros((len(x), *shape, filters))
    for place in itertools.product(*map(range, size)):
        first = [place[i] * layer.dilation_rate[i] for i in axes]
        counts = [x.shape[1 + i] for i in axes]
        at = [slice(first[i], first[i] + (counts[i] - 1) * spread[i] + 1, spread[i]) for i in axes]
        y[:, *at] += x @ kernel[place].T
    return y


REFERENCES: dict[Any, Callable[[Layer, np.ndarray, np.ndarray], np.ndarray]] = {
    keras.layers.Conv1D: convolved,
    keras.layers.Conv2D: convolved,
    keras.layers.Conv3D: convolved,
    keras.layers.DepthwiseConv1D: depthwise,
    keras.layers.DepthwiseConv2D: depthwise,
    keras.layers.Conv1DTranspose: transposed,
    keras.layers.Conv2DTranspose: transposed,
    keras.layers.Conv3DTranspose: transposed,
}
