"""The cases of layers that every invariant runs over, and a float64 reference in NumPy.

All dimensions are distinct primes, so that a transposed axis cannot go unseen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
import numpy as np

import keras_lora as kl
from keras_lora.layers import LayerAdapter
from support import convolutions

RANK, ALPHA = 2, 5.0
# Relative rounding of a low-precision result against float64, a few units in the last place.
ROUNDING = {"mixed_bfloat16": 3e-2, "bfloat16": 3e-2, "mixed_float16": 4e-3, "float16": 4e-3}
VOCABULARY, DIM = 13, 5


@dataclass(frozen=True)
class Case:
    """A layer, its inputs, and the equation that tells what its kernel's axes mean."""

    id: str
    make: Callable[..., keras.layers.Layer]
    input_shape: tuple[int, ...]  # without the batch
    equation: str  # for the input's actual rank, written out without an ellipsis
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def is_table(self) -> bool:
        return self.make in (keras.layers.Embedding, keras.layers.ReversibleEmbedding)

    @property
    def is_convolution(self) -> bool:
        return self.make in convolutions.REFERENCES

    @property
    def eager(self) -> bool:
        """Whether `fit` is faster eagerly; TensorFlow compiles each call of a grouped one then."""
        return keras.backend.backend() == "tensorflow" and "groups" not in self.options

    @property
    def looks_up(self) -> bool:
        """Whether the inputs are tokens, which the equation takes as one-hot vectors."""
        return self.is_table and not self.call

    def layer(self, **overrides: Any) -> keras.layers.Layer:
        return self.make(name="case", **(self.options | overrides))

    def model(self, **overrides: Any) -> keras.Model:
        inputs = keras.Input(self.input_shape, dtype="int32" if self.looks_up else "float32")
        model = keras.Model(inputs, self.layer(**overrides)(inputs, **self.call))
        randomize(model.weights)
        return model

    def batch(self, size: int = 3) -> np.ndarray:
        rng, shape = np.random.default_rng(1), (size, *self.input_shape)
        if self.looks_up:
            return rng.integers(0, VOCABULARY, shape).astype("int32")
        return rng.normal(size=shape).astype("float32")


def dense(id_: str, *input_shape: int, **options: Any) -> Case:
    labels = "abcde"[: len(input_shape)]
    equation = f"{labels}x,xy->{labels}y"
    return Case(id_, keras.layers.Dense, input_shape, equation, {"units": 7, **options})


def einsum(
    equation: str,
    input_shape: tuple[int, ...],
    output_shape: tuple[int | None, ...],
    written_out: str | None = None,
    **options: Any,
) -> Case:
    options = {"equation": equation, "output_shape": output_shape, **options}
    return Case(equation, keras.layers.EinsumDense, input_shape, written_out or equation, options)


def table(id_: str, *input_shape: int, **options: Any) -> Case:
    labels = "abcde"[: len(input_shape) + 1]
    make = options.pop("make", keras.layers.ReversibleEmbedding)
    options = {"input_dim": VOCABULARY, "output_dim": DIM, **options}
    return Case(id_, make, input_shape, f"{labels}x,xy->{labels}y", options)


def reverse(id_: str, *input_shape: int, **options: Any) -> Case:
    """The reverse call of an embedding with tied weights; untied ones are another matrix."""
    lookup = table(id_, *input_shape[:-1], **options)
    inputs, kernel, output = _operands(lookup.equation)
    equation = f"{output},{kernel}->{inputs}"
    return Case(id_, lookup.make, input_shape, equation, lookup.options, {"reverse": True})


def convolution(
    id_: str, make: type, input_shape: tuple[int, ...], equation: str, **options: Any
) -> Case:
    """The equation is that of patches; of a depthwise convolution, of those of one channel."""
    return Case(id_, make, input_shape, equation, options)


def _operands(equation: str) -> tuple[str, str, str]:
    inputs, rest = equation.split(",")
    kernel, output = rest.split("->")
    return inputs, kernel, output


EMBEDDING = {"make": keras.layers.Embedding}
CASES = [
    dense("dense", 5),
    dense("dense, no bias", 5, use_bias=False),
    dense("dense, activation", 5, activation="gelu"),
    dense("dense, sequence", 11, 5, activation="tanh"),
    dense("dense, image", 2, 11, 5),
    einsum("ab,bc->ac", (5,), (7,), bias_axes="c"),
    einsum("btd,dnh->btnh", (11, 5), (None, 2, 7), bias_axes="nh", activation="gelu"),
    dataclasses.replace(
        einsum("btd,dnh->btnh", (11, 5), (None, 2, 7), bias_axes="n"), id="a bias for each head"
    ),
    einsum("btnh,nhd->btd", (11, 2, 7), (None, 5), bias_axes="d"),
    einsum("btd,nhd->btnh", (11, 5), (None, 2, 7)),
    einsum("btd,dnh->bnth", (11, 5), (2, None, 7)),
    einsum("btd,hdn->bhnt", (11, 5), (7, 2, None)),
    einsum("bdt,dnh->btnh", (5, 11), (None, 2, 7)),
    einsum("...x,xy->...y", (11, 5), (7,), "abx,xy->aby", bias_axes="y"),
    einsum("...ax,axy->...y", (11, 3, 5), (7,), "bcax,axy->bcy"),
    einsum("ab...,bc->ac...", (5, 11), (7,), "abt,bc->act", bias_axes="c"),
    einsum("bed,edf->bef", (3, 5), (3, 7), bias_axes="ef"),
    einsum("betd,edf->betf", (3, 11, 5), (3, None, 7)),
    einsum("btd,ed->bte", (11, 5), (None, 7)),
    einsum("btd,d->bt", (11, 5), (None,)),
    einsum("bsd,df->bf", (11, 5), (7,)),
    einsum("bd,d->bd", (5,), (5,)),
    einsum("bt,f->btf", (11,), (None, 7)),
    table("embedding", 11, **EMBEDDING),
    table("embedding, one token, mask_zero", mask_zero=True, **EMBEDDING),
    table("reversible, tied", 11, mask_zero=True),
    table("reversible, untied", 3, 11, tie_weights=False),
    reverse("reverse", 11, DIM),
    reverse("reverse, soft cap", DIM, logit_soft_cap=2.0),
    reverse("reverse, its own dtype", 2, 11, DIM, reverse_dtype="float32"),
    convolution(
        "conv1d, causal",
        keras.layers.Conv1D,
        (13, 5),
        "bpux,uxy->bpy",
        filters=7,
        kernel_size=3,
        dilation_rate=2,
        padding="causal",
        activation="tanh",
    ),
    convolution(
        "conv2d, same",
        keras.layers.Conv2D,
        (13, 11, 5),
        "bpquvx,uvxy->bpqy",
        filters=7,
        kernel_size=(2, 3),
        strides=2,
        padding="same",
        activation="gelu",
    ),
    convolution(
        "conv2d, groups",
        keras.layers.Conv2D,
        (10, 11, 13),
        "bpquvx,uvxy->bpqy",
        filters=14,
        kernel_size=(3, 2),
        groups=2,
        data_format="channels_first",
    ),
    convolution(
        "conv3d, no bias",
        keras.layers.Conv3D,
        (5, 7, 11, 3),
        "bpqsuvwx,uvwxy->bpqsy",
        filters=7,
        kernel_size=(3, 2, 5),
        use_bias=False,
    ),
    convolution(
        "conv2d, transposed",
        keras.layers.Conv2DTranspose,
        (5, 11, 13),
        "bpquvx,uvyx->bpqy",
        filters=7,
        kernel_size=(3, 2),
        strides=2,
        activation="gelu",
    ),
    convolution(
        "conv1d, transposed",
        keras.layers.Conv1DTranspose,
        (11, 5),
        "bpux,uyx->bpy",
        filters=7,
        kernel_size=3,
        dilation_rate=1 if keras.backend.backend() == "tensorflow" else 2,  # not on its CPUs
    ),
    convolution(
        "conv2d, depthwise",
        keras.layers.DepthwiseConv2D,
        (11, 13, 5),
        "bpquv,uvxy->bpqxy",
        kernel_size=(3, 2),
        strides=2,
        padding="same",
        depth_multiplier=7,
        activation="gelu",
    ),
    convolution(
        "conv1d, depthwise",
        keras.layers.DepthwiseConv1D,
        (5, 13),
        "bpu,uxy->bpxy",
        kernel_size=3,
        dilation_rate=2,
        data_format="channels_first",
    ),
]
BY_ID = {case.id: case for case in CASES}
IDS = [f"{i}: {case.id}" for i, case in enumerate(CASES)]
TABLES = [case for case in CASES if case.is_table]
CONVOLUTIONS = [case for case in CASES if case.is_convolution]
LINEAR = [case for case in CASES if not case.is_table and not case.is_convolution]


def named(*ids: str) -> list[Case]:
    return [BY_ID[name] for name in ids]


def config(**options: Any) -> kl.LoRAConfig:
    return kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets=["case"], **options)


def adapted(case: Case, base: keras.Model | None = None, **options: Any) -> keras.Model:
    """The case's model with an adapter whose A and B are random, so that it does something."""
    model = kl.apply_lora(case.model() if base is None else base, config(**options))
    randomize(adapter(model).factors)
    return model


def adapter(model: keras.Model, name: str = "default") -> LayerAdapter:
    (layer,) = kl.lora_layers(model).values()
    return layer.adapters[name]


def randomize(variables: Any) -> None:
    """Values of standard deviation 0.4, whatever the initializers are.

    The scale and the dropout rate of a slot stay, which follow from the adapter in it.
    """
    rng = np.random.default_rng(3)
    for variable in variables:
        if getattr(variable, "name", "").startswith(("lora_scaling", "lora_dropout", "lora_dora")):
            continue
        if np.issubdtype(np.dtype(variable.dtype), np.inexact) or variable.dtype == "bfloat16":
            variable.assign(rng.normal(scale=0.4, size=variable.shape))


def numpy_of(value: Any) -> np.ndarray:
    """A copy in float64."""
    return np.array(keras.ops.convert_to_numpy(value)).astype("float64")


def relative(received: object, expected: object) -> float:
    """The largest difference, divided by the largest expected magnitude."""
    received, expected = numpy_of(received), numpy_of(expected)
    assert received.shape == expected.shape
    return float(np.abs(received - expected).max() / np.abs(expected).max())


def snapshot(variables: Any) -> list[bytes]:
    return [np.array(keras.ops.convert_to_numpy(v)).tobytes() for v in variables]


def kernel_of(layer: keras.layers.Layer) -> Any:
    """The effective matrix, or the variable of a plain layer."""
    return layer.embeddings if isinstance(layer, keras.layers.Embedding) else layer.kernel


def reference_delta(case: Case, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """s A B in the kernel's shape: A has the contracted axes, B the free ones, both the shared."""
    if case.is_table:  # (vocabulary, r) (r, dim), whichever way it is used
        return scale * a @ b
    _, kernel, output = _operands(case.equation)
    shared = [c for c in kernel if c in _operands(case.equation)[0] and c in output]
    contracted = [c for c in kernel if c not in output]
    free = [c for c in kernel if c not in shared + contracted]
    a_axes, b_axes = "".join([*shared, *contracted, "R"]), "".join([*shared, "R", *free])
    return scale * np.einsum(f"{a_axes},{b_axes}->{kernel}", a, b)


def reference_dora(case: Case, kernel: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """m W / |W|: the norm is over the axes that an output is summed over."""
    inputs, labels, output = _operands(case.equation)
    free = [c for c in labels if c not in inputs]
    outputs = "".join([*(c for c in labels if c in inputs and c in output), *free])
    gain = magnitude / np.sqrt(np.einsum(f"{labels},{labels}->{outputs}", kernel, kernel))
    return np.einsum(f"{labels},{outputs}->{labels}", kernel, gain)


def reference_output(case: Case, model: keras.Model, x: np.ndarray, kernel: np.ndarray) -> Any:
    """act(x W + b) in float64."""
    layer = model.get_layer("case")
    one_hot = np.eye(VOCABULARY)[x] if case.looks_up else x.astype("float64")
    if case.is_convolution:
        return _convolution_output(case, layer, one_hot, kernel)
    y = np.einsum(case.equation, one_hot, kernel)
    if case.is_table:
        cap = case.options.get("logit_soft_cap")
        return y if cap is None else cap * np.tanh(y / cap)
    return _finished(layer, y)


def _convolution_output(case: Case, layer: Any, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    first = layer.data_format == "channels_first"
    y = convolutions.REFERENCES[case.make](layer, np.moveaxis(x, 1, -1) if first else x, kernel)
    y = _finished(layer, y)
    return np.moveaxis(y, -1, 1) if first else y


def _finished(layer: Any, y: np.ndarray) -> np.ndarray:
    """With bias and activation."""
    if layer.bias is not None:
        y = y + numpy_of(layer.bias)
    if layer.activation is None:
        return y
    return _ACTIVATIONS[layer.activation.__name__](y)


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda y: y,
    "tanh": np.tanh,
    "gelu": lambda y: y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2,
}
