"""How the kernel of a convolution, and the updates of its adapters, act on an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import keras
from keras import ops

from keras_lora.lowrank.equations import EinsumSplit, Shape, Tensor, times
from keras_lora.lowrank.products import FormingProducts, Term

# A convolution of an input and a kernel, as a layer has it.
Operation = Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Convolution(FormingProducts):
    """The products of a convolution: with `A` one to `r` channels, with `B` one of size 1.

    A kernel is formed and used once, so nothing of the output's size is added. Where that costs
    less, no gradient of the kernel's shape is taken, but those of `A` and `B`:

        y = conv(x, W0 + A B)        dB = conv(x, A)^T dy        dA = dconv(x, A)/dA . (dy B^T)

    Attributes:
        layer: The layer.
        split: How the kernel is factored.
        w: `W0`, without a gradient.
        operation: The layer's convolution, without bias and activation.
        down: `A` as a kernel of the operation.
        groups: Each group of outputs has channels of its own in the input.
        is_pointwise: Whether it is a product of matrices, and trains as one: on a processor the
            gradients of a convolution of size 1 take longer.
    """

    layer: Any
    split: EinsumSplit
    w: Tensor
    operation: Operation
    down: Callable[[Tensor], Tensor]
    groups: int = 1
    is_pointwise: bool = False

    def base(self, x: Tensor) -> Tensor:
        return self.operation(x, self.w)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ones: Any = (1,) * (len(x.shape) - 2)
        up = ops.reshape(b, (*ones, *b.shape))
        hidden = self.operation(x, self.down(a))
        return ops.conv(hidden, up, data_format=self.layer.data_format)

    def times_gain(self, product: Tensor, gain: Tensor) -> Tensor:
        return times(product, by_channel(self.layer, gain, len(product.shape)))

    def joint(self, x: Tensor, terms: Sequence[Term], training: bool) -> Tensor | None:
        thin, has_gain = training and self._thin(terms), any(t.gain is not None for t in terms)
        if loses_digits(self.w) or (thin and has_gain):
            return None
        w = self.split.effective(self.w, [term[1:] for term in terms])
        operation = _matrix_product if training and self.is_pointwise else self.operation
        if not thin:
            return operation(x, w)
        y, still = operation(x, ops.stop_gradient(w)), ops.stop_gradient(x)
        for term in terms:
            y = self._with_gradient(y, operation(still, self.down(term.a)), term.b)
        return y

    def _thin(self, terms: Sequence[Term]) -> bool:
        """Whether the gradients of `A` and `B` alone cost less than that of the kernel `A B`.

        By products counted for each output position: `2 r (d + k)` and `d k`. Thin ones take three
        times as long on two processors (`benchmarks/convolutions.py`).
        """
        inputs, outputs = self.split.matrix_shape(tuple(self.w.shape))
        rank = sum(term.a.shape[-1] for term in terms)
        return 3 * 2 * rank * (inputs * self.groups + outputs) < inputs * outputs

    def _with_gradient(self, y: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
        """`y`, with the gradient that `y + (x A) B` has with respect to `x A` and `B`."""

        @ops.custom_gradient
        def same(y: Tensor, hidden: Tensor, b: Tensor) -> Any:
            def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
                dy = args[0] if upstream is None else upstream
                outputs, inputs = self._by_group(dy), self._by_group(hidden)
                columns = ops.reshape(b, (b.shape[0], self.groups, -1))
                d_hidden = ops.matmul(outputs, ops.transpose(columns, (1, 2, 0)))
                d_b = ops.matmul(ops.transpose(inputs, (0, 2, 1)), outputs)  # (groups, r, k)
                d_b = ops.reshape(ops.transpose(d_b, (1, 0, 2)), b.shape)
                return dy, self._from_groups(d_hidden, ops.shape(hidden)), d_b

            return y, gradient

        return same(y, hidden, b)

    def _by_group(self, x: Tensor) -> Tensor:
        """`(groups, batch and positions, channels of a group)`."""
        if self.layer.data_format == "channels_first":
            x = ops.moveaxis(x, 1, -1)
        rows = ops.reshape(x, (-1, self.groups, x.shape[-1] // self.groups))
        return ops.transpose(rows, (1, 0, 2))

    def _from_groups(self, rows: Tensor, shape: Shape) -> Tensor:
        """The inverse of `_by_group`, for a tensor of this shape."""
        rows = ops.transpose(rows, (1, 0, 2))
        if self.layer.data_format == "channels_last":
            return ops.reshape(rows, shape)
        batch, channels, *space = shape
        return ops.moveaxis(ops.reshape(rows, (batch, *space, channels)), -1, 1)


def convolution_products(layer: Any, split: EinsumSplit, w: Tensor) -> Convolution:
    """The products of `Conv1D`, `Conv2D` or `Conv3D`."""

    def down(a: Tensor) -> Tensor:
        return ops.concatenate([a] * layer.groups, -1) if layer.groups > 1 else a

    def operation(x: Tensor, kernel: Tensor) -> Tensor:
        return convolve(layer, x, kernel)

    pointwise = layer.groups == 1 and _is_pointwise(layer, w) and set(layer.strides) == {1}
    return Convolution(layer, split, ops.stop_gradient(w), operation, down, layer.groups, pointwise)


def transposed_products(layer: Any, split: EinsumSplit, w: Tensor) -> Convolution:
    """The products of a transposed convolution, whose kernel has its outputs before its inputs."""

    def down(a: Tensor) -> Tensor:
        return ops.swapaxes(a, -1, -2)

    def operation(x: Tensor, kernel: Tensor) -> Tensor:
        return ops.conv_transpose(x, kernel, **_options(layer), output_padding=layer.output_padding)

    return Convolution(layer, split, ops.stop_gradient(w), operation, down)


def pointwise_products(layer: Any, split: EinsumSplit, w: Tensor) -> Convolution:
    """The products of the second step of a separable convolution, of size and stride 1."""

    def operation(x: Tensor, kernel: Tensor) -> Tensor:
        return ops.conv(x, kernel, data_format=layer.data_format)

    pointwise = _is_pointwise(layer, w)
    return Convolution(
        layer, split, ops.stop_gradient(w), operation, lambda a: a, is_pointwise=pointwise
    )


def _is_pointwise(layer: Any, w: Tensor) -> bool:
    return layer.data_format == "channels_last" and set(w.shape[:-2]) == {1}


def _matrix_product(x: Tensor, kernel: Tensor) -> Tensor:
    """The convolution with a kernel of size and stride 1, as `(positions, d) @ (d, k)`."""
    inputs, outputs = kernel.shape[-2:]
    rows = ops.matmul(ops.reshape(x, (-1, inputs)), ops.reshape(kernel, (inputs, outputs)))
    return ops.reshape(rows, (*ops.shape(x)[:-1], outputs))


@final
@dataclass(frozen=True, eq=False)
class Depthwise(FormingProducts):
    """The products of a depthwise convolution: always with a kernel `A B`, which is small.

    In two steps, the first would have `r` outputs for each channel of the input.

    Attributes:
        layer: The layer.
        split: How the kernel is factored.
        w: `W0`, without a gradient.
    """

    layer: Any
    split: EinsumSplit
    w: Tensor

    def base(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.w)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self._convolved(x, self.split.delta(a, b))

    def times_gain(self, product: Tensor, gain: Tensor) -> Tensor:
        return times(product, by_channel(self.layer, gain, len(product.shape)))

    def joint(self, x: Tensor, terms: Sequence[Term], training: bool) -> Tensor | None:  # noqa: ARG002
        if loses_digits(self.w):
            return None
        return self._convolved(x, self.split.effective(self.w, [term[1:] for term in terms]))

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        return ops.depthwise_conv(x, kernel, **_options(self.layer))


def convolve(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """What `Conv1D`, `Conv2D` or `Conv3D` compute with a kernel, before bias and activation."""
    options = _options(layer)
    if options["padding"] == "causal":  # of `Conv1D` alone
        none, width = [0, 0], [layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0]
        last = layer.data_format == "channels_last"
        x = ops.pad(x, [none, width, none] if last else [none, none, width])
        options["padding"] = "valid"
    return ops.conv(x, kernel, **options)


def _options(layer: Any) -> dict[str, Any]:
    names = ("strides", "padding", "dilation_rate", "data_format")
    return {name: getattr(layer, name) for name in names}


def channel_bias(layer: Any) -> Tensor | None:
    """The bias of a convolution, in a shape that adds to its output."""
    return None if layer.bias is None else by_channel(layer, layer.bias, layer.rank + 2)


def by_channel(layer: Any, values: Tensor, axes: int) -> Tensor:
    """A value for each channel, in a shape that acts on the channels of an output."""
    ones: Any = (1,) * (axes - 2)
    shape = (1, *ones, -1) if layer.data_format == "channels_last" else (1, -1, *ones)
    return ops.reshape(values, shape)


def loses_digits(w: Tensor) -> bool:
    """Whether a small update would be lost in a sum with `W0`: in 16 bits."""
    return keras.backend.standardize_dtype(w.dtype) in ("float16", "bfloat16")
