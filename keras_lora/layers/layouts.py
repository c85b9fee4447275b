"""How variables are spread over devices by `keras.distribution`, which works on JAX.

A factor is split along each axis that it has in common with its matrix as the matrix is; the rank
is whole on every device. Optimizers give moments the layout of their variable. So the layouts
follow from the matrix alone: no key of a `LayoutMap` has to match the names of factors, and
adapters may be added outside of the distribution's scope.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_layout`: the layout that a variable was made with; None outside of a distribution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, final

import keras

from keras_lora.lowrank.equations import EinsumSplit, Shape, Tensor

Layout: TypeAlias = "keras.distribution.TensorLayout"


def layout_of(variable: keras.Variable) -> Layout | None:
    """The layout of a variable; None for one that was made outside of a distribution."""
    layout = getattr(variable, "_layout", None)
    return layout if isinstance(layout, keras.distribution.TensorLayout) else None


def spread(value: Tensor, layout: Layout | None) -> Tensor:
    """A value of which each device has its part. From the host, no device has the whole."""
    return value if layout is None else keras.distribution.distribute_tensor(value, layout)


def factor_layout(
    matrix: keras.Variable, split: EinsumSplit, name: str, shape: Shape
) -> Layout | None:
    """The layout of a variable `lora_...` of a slot, from that of the slot's matrix."""
    layout = layout_of(matrix)
    if layout is None:
        return None
    which = name.removeprefix("lora_").split("_")[0]
    labels = {"a": split.a, "a0": split.a, "b": split.b, "b0": split.b, "tokens": split.kernel}
    labels |= dict.fromkeys(("magnitude", "squared"), split.outputs)
    by_label = dict(zip(split.kernel, layout.axes, strict=False))
    # Integers of a quantized matrix may be packed into other axes.
    known = which in labels and len(matrix.shape) == len(split.kernel)
    axes = [by_label.get(c) for c in labels[which]] if known else [None] * len(shape)
    if which == "tokens":
        axes[0] = None  # a few rows of the matrix
    sizes = dict(zip(layout.device_mesh.axis_names, layout.device_mesh.shape, strict=True))
    axes = [x if n % sizes.get(x, 1) == 0 else None for x, n in zip(axes, shape, strict=True)]
    return keras.distribution.TensorLayout(axes, layout.device_mesh)


@contextlib.contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
    """Within the context each variable that is made has this layout, whatever its path."""
    if layout is None:
        yield
        return
    every = keras.distribution.LayoutMap(layout.device_mesh)
    every[".*"] = layout
    with keras.distribution.ModelParallel(layout_map=every).scope():
        yield


def whole(layout: Layout | None) -> Layout | None:
    """The layout of a scalar on the same devices."""
    return None if layout is None else keras.distribution.TensorLayout((), layout.device_mesh)


@final
class _Given(keras.initializers.Initializer):
    """A value that is there. Keras traces the bound `__call__` of initializers of large values."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def __call__(self, shape: Shape, dtype: Any = None) -> Tensor:  # noqa: ARG002
        return self._value


def drawn(initializer: Any, shape: Shape, dtype: str, layout: Layout | None) -> Any:
    """An initializer, drawn now where there is a layout: Keras would trace that of a large one."""
    if layout is None:
        return initializer
    draw: Callable[..., Tensor] = keras.initializers.get(initializer)
    return _Given(spread(draw(shape, dtype=dtype), layout))
