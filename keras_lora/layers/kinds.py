"""`KINDS`, a row for each kind of matrix that can be adapted, and `Site`, such a matrix of a layer.

What differs between Keras's classes is in `KINDS` and nowhere else: a new class of layer takes
a row of `KINDS` and a final class (CONTRIBUTING.md adds one).

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_kernel`, `_embeddings`: the frozen matrix itself, since `kernel` and `embeddings` of an
        adapted layer give the effective one.
    `ConvLSTMCell`: the cells of `ConvLSTM1D` to `ConvLSTM3D`, whose class has no public name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import keras
from keras import ops

from keras_lora.checks import invalid
from keras_lora.initializers import EMBEDDING_START, FrozenMatrix, Start, start_of
from keras_lora.layers.convolving import (
    Depthwise,
    convolution_products,
    pointwise_products,
    transposed_products,
)
from keras_lora.layers.quantized import (
    Integers,
    Quantized,
    float_shape,
    frozen_product,
    integers_of,
    mode_of,
)
from keras_lora.lowrank.equations import EinsumSplit, Shape, Tensor, split_equation
from keras_lora.lowrank.products import Products, einsum_products

Layer: TypeAlias = "keras.layers.Layer"
Family = Literal["linear", "embedding", "convolution", "recurrent", "expert", "weight"]

CONV_LSTM_CELL: Any = keras.layers.ConvLSTM1D.__init__.__globals__["ConvLSTM"]
CONV_LSTM_CELL = CONV_LSTM_CELL.__init__.__globals__["ConvLSTMCell"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the rest of the package asks about a matrix `W0` of a Keras layer.

    Attributes:
        equation: The einsum of the layer's input and the matrix, such as `"...x,xy->...y"`; the
            shapes of `A` and `B` follow from it.
        matrix: The layer's attribute that is the frozen variable `W0`.
        item: Which item of the attribute is `W0`, where the attribute is a list, tuple or dict.
        bias: The layer's attribute that is the bias; None for a layer without one.
        constraint: The layer's attribute that is the constraint on `W0`; None where the variable
            alone says it.
        family: Which presets of `targets` select it, and which adapters of other tools may
            contain it: `"all-linear"` and `"attention"` select linear ones, `"all"` every family
            but `"weight"`, of bare variables.
        products: How `W0` acts on an input. The default is the einsum.
        quantizes: Whether Keras's quantized forms of it can be adapted (`quantized`).
        start: How factors begin; None where `AdapterSpec.init` says it. A start that does not
            yield to it goes before it.
        has_dropout: Whether dropout applies to the adapter's input.
        takes_dora: Whether DoRA applies: whether the equation is all that `W0` does.
        must_save: Whether a matrix for which no rank saves parameters is refused.
        by_row: Whether each row of a batch can have an adapter of its own (`MixedBatch`).
    """

    equation: Callable[[Layer], str]
    matrix: str = "_kernel"
    item: int | str | None = None
    bias: str | None = "bias"
    constraint: str | None = "kernel_constraint"
    family: Family = "linear"
    products: Callable[[Site, Tensor], Products] | None = None
    quantizes: bool = False
    start: Start | None = None
    has_dropout: bool = True
    takes_dora: bool = True
    must_save: bool = False
    by_row: bool = False

    def start_of(self, init: str) -> Start:
        """How the factors of an adapter with this `init` begin."""
        start = start_of(init)
        return self.start if self.start is not None and start.yields else start


@dataclass(frozen=True, eq=False)
class Site:
    """One matrix of one layer, adapted or not: the place that an adapter has in a model.

    Attributes:
        layer: The layer.
        kind: The row of the matrix in `KINDS`.
        name: The name of the matrix; empty where the layer has one matrix.
    """

    layer: Layer
    kind: Kind
    name: str = ""

    @property
    def matrix(self) -> keras.Variable:
        """The variable with `W0`; of a quantized layer, with its integers."""
        # Of some adapted layers the attribute itself is the effective matrix (`EffectiveMatrix`).
        name, held = self.attribute, vars(self.layer)
        value = held[name] if name in held else getattr(self.layer, name)
        return value if self.kind.item is None else value[self.kind.item]

    @property
    def attribute(self) -> str:
        """The layer's attribute that is the variable."""
        return integers_of(self.layer, self.kind.matrix)

    @property
    def is_quantized(self) -> bool:
        return self.kind.quantizes and mode_of(self.layer) is not None

    @property
    def shape(self) -> Shape:
        """The shape of `W0` in floating point."""
        return float_shape(self.layer) if self.is_quantized else tuple(self.matrix.shape)

    @property
    def dtype(self) -> str:
        """The dtype of `W0` in floating point."""
        dtype = self.layer.variable_dtype if self.is_quantized else self.matrix.dtype
        return str(keras.backend.standardize_dtype(dtype))

    @property
    def bias(self) -> keras.Variable | None:
        return None if self.kind.bias is None else getattr(self.layer, self.kind.bias)

    @property
    def wide_dtype(self) -> str:
        """The dtype of sums, which are rounded once at the end."""
        return "float64" if self.dtype == "float64" else "float32"

    def assign(self, value: Tensor) -> None:
        """`W0 <- value`.

        Raises:
            ValueError: a quantized layer, whose integers are no place for it.
        """
        if self.is_quantized:
            raise invalid(
                "value",
                f"a layer in floating point, to assign to its W0; {self.layer.name!r} is quantized",
                value,
                'call merge_lora(model, quantized="dequantize") first',
            )
        self.matrix.assign(value)

    def weight(self) -> Tensor:
        """`W0` in floating point."""
        if self.is_quantized:
            return Integers.of(self.layer).weight(self.wide_dtype)
        return ops.convert_to_tensor(self.matrix)

    def wide_matrix(self) -> Tensor:
        """`W0` in the wide dtype."""
        return ops.cast(self.weight(), self.wide_dtype)

    def frozen_matrix(self, measured: Any = None) -> FrozenMatrix:
        """`W0` as starts see it, with what they have measured on data."""
        split = self.split()
        shape = split.stacked_shape(self.shape)
        return FrozenMatrix(shape, lambda: split.stacked(self.wide_matrix()), measured)

    def rows(self, tokens: Sequence[int]) -> Callable[..., Tensor]:
        """These rows of `W0`, as an initializer."""

        def drawn(_: Shape = (), dtype: str = "float32") -> Tensor:
            matrix = ops.stop_gradient(self.weight())
            return ops.cast(ops.take(matrix, ops.array(tokens, "int32"), axis=0), dtype)

        return drawn

    def check_tokens(self, tokens: Sequence[int], path: str) -> None:
        """
        Raises:
            ValueError: tokens that the matrix has no rows of.
        """
        count = self.shape[0] if self.kind.family == "embedding" else 0
        if tokens and max(tokens) >= count:
            expected = f"ids below {count}, of the {count} rows of {path!r}"
            if not count:
                expected = f"no rows of {path!r}, which is no embedding"
            raise invalid("train_tokens", expected, [t for t in tokens if t >= count])

    def split(self, input_rank: int | None = None) -> EinsumSplit:
        """How the matrix is factored.

        Raises:
            ValueError: the equation has a diagonal.
        """
        return split_equation(self.kind.equation(self.layer), input_rank)

    def products(self, inputs: Tensor) -> Products:
        """How `W0` acts on these inputs."""
        if self.kind.products is not None:
            return self.kind.products(self, inputs)
        split = self.split(len(inputs.shape))
        if self.is_quantized:
            return Quantized(frozen_product(self.layer, split), split, self.shape)
        return einsum_products(split, self.weight())


def dense_equation(layer: Layer) -> str:  # noqa: ARG001
    return "...x,xy->...y"


def einsum_dense_equation(layer: Layer) -> str:
    return layer.equation


def convolution_equation(layer: Layer) -> str:
    """The einsum of patches of the input, which are never formed."""
    space = "uvw"[: layer.rank]
    return f"...{space}x,{space}xy->...y"


def transposed_equation(layer: Layer) -> str:
    space = "uvw"[: layer.rank]
    return f"...{space}x,{space}yx->...y"


def depthwise_equation(layer: Layer) -> str:
    """Of patches of one channel, so that all channels share the `A` of the positions."""
    space = "uvw"[: layer.rank]
    return f"...{space},{space}xy->...xy"


def _convolution(site: Site, _: Tensor) -> Products:
    return convolution_products(site.layer, site.split(), site.weight())


def _transposed(site: Site, _: Tensor) -> Products:
    return transposed_products(site.layer, site.split(), site.weight())


def _pointwise(site: Site, _: Tensor) -> Products:
    return pointwise_products(site.layer, site.split(), site.weight())


def _depthwise(site: Site, _: Tensor) -> Products:
    return Depthwise(site.layer, site.split(), ops.stop_gradient(site.weight()))


_DENSE = Kind(equation=dense_equation, by_row=True, quantizes=True)
_EINSUM_DENSE = Kind(equation=einsum_dense_equation, by_row=True, quantizes=True)
# The einsum of an embedding is that of tokens as one-hot vectors, which are never formed.
_EMBEDDING = Kind(
    equation=dense_equation,
    matrix="_embeddings",
    bias=None,
    constraint="embeddings_constraint",
    family="embedding",
    start=EMBEDDING_START,
    # An embedding adapter is fed token ids, so dropout does not apply.
    has_dropout=False,
    # The outputs are columns in the lookup and rows in reverse: no one norm serves both.
    takes_dora=False,
    quantizes=True,
)

_CONVOLUTION = Kind(equation=convolution_equation, family="convolution", products=_convolution)
_TRANSPOSED = Kind(
    equation=transposed_equation, matrix="kernel", family="convolution", products=_transposed
)
# A cell forms its effective matrices once for all time steps: see `recurrent`.
_INPUT_CELL = Kind(equation=dense_equation, matrix="kernel", family="recurrent", has_dropout=False)
_STATE_CELL = dataclasses.replace(
    _INPUT_CELL, matrix="recurrent_kernel", bias=None, constraint="recurrent_constraint"
)
_CELL = {"kernel": _INPUT_CELL, "recurrent_kernel": _STATE_CELL}
_CONVOLVING_CELL = {
    name: dataclasses.replace(kind, equation=convolution_equation) for name, kind in _CELL.items()
}

_DEPTHWISE = Kind(
    equation=depthwise_equation,
    matrix="kernel",
    constraint="depthwise_constraint",
    family="convolution",
    products=_depthwise,
    must_save=True,
)
_SEPARABLE = {
    "depthwise_kernel": replace(_DEPTHWISE, matrix="depthwise_kernel", bias=None),
    "pointwise_kernel": Kind(
        equation=convolution_equation,
        matrix="pointwise_kernel",
        constraint="pointwise_constraint",
        family="convolution",
        products=_pointwise,
    ),
}

# For each layer class the kinds of its matrices, by name; a layer's only matrix is named "".
KINDS: dict[type, Mapping[str, Kind]] = {
    keras.layers.Dense: {"": _DENSE},
    keras.layers.EinsumDense: {"": _EINSUM_DENSE},
    keras.layers.Embedding: {"": _EMBEDDING},
    keras.layers.ReversibleEmbedding: {"": _EMBEDDING},
    keras.layers.Conv1D: {"": _CONVOLUTION},
    keras.layers.Conv2D: {"": _CONVOLUTION},
    keras.layers.Conv3D: {"": _CONVOLUTION},
    keras.layers.Conv1DTranspose: {"": _TRANSPOSED},
    keras.layers.Conv2DTranspose: {"": _TRANSPOSED},
    keras.layers.Conv3DTranspose: {"": _TRANSPOSED},
    keras.layers.DepthwiseConv1D: {"": _DEPTHWISE},
    keras.layers.DepthwiseConv2D: {"": _DEPTHWISE},
    keras.layers.LSTMCell: _CELL,
    keras.layers.GRUCell: _CELL,
    keras.layers.SimpleRNNCell: _CELL,
    CONV_LSTM_CELL: _CONVOLVING_CELL,
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
}


def kinds_of(layer_class: type) -> Mapping[str, Kind]:
    """The kinds of a class's matrices: those of the nearest class in `KINDS`, itself first."""
    return next((KINDS[c] for c in layer_class.__mro__ if c in KINDS), {})


def family_of(layer: Layer) -> Family | None:
    """The family of a layer's matrices; None for a layer that has no kind."""
    kinds = kinds_of(type(layer))
    return next(iter(kinds.values())).family if kinds else None


def only(sites: Mapping[str, Any], layer: Layer) -> Any:
    """The site, or the bank, of a layer's only matrix.

    Raises:
        ValueError: the layer has several.
    """
    if len(sites) != 1:
        raise invalid(
            "layer", "a layer with one matrix", sorted(sites), f"name a matrix of {layer.name!r}"
        )
    (site,) = sites.values()
    return site
