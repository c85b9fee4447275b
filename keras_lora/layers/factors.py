"""Values of an adapter: parked as an array, or in a variable that a layer computes with.

Switching adapters is mostly these reads and writes, so on TensorFlow they use the `tf.Variable`
itself: Keras's `Variable.assign` also converts, casts and reads the variable back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
import numpy as np
from keras import ops

from keras_lora.checks import warn
from keras_lora.layers.layouts import layout_of, spread
from keras_lora.lowrank.equations import Shape, Tensor


def read(variable: keras.Variable) -> Tensor:
    """The present value, in the host's memory, which no later step changes."""
    if keras.backend.backend() != "tensorflow":
        return np.array(ops.convert_to_numpy(variable), copy=True)
    # The variable's own memory: TensorFlow releases or copies it before it writes.
    value = variable.value.value()
    return value if "CPU" in value.device else value.numpy()


def write(variable: keras.Variable, value: Any) -> None:
    """Give a variable a value of the variable's own shape and dtype."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        variable.value.assign(value, read_value=False)
    elif backend == "torch":
        # Other memory: a forward pass may have kept the old one for its gradient.
        variable.value.data = ops.convert_to_tensor(value, variable.dtype)
    else:
        # The class's own `assign`, also where `protected`.
        type(variable).assign(variable, spread(value, layout_of(variable)))


def protected(variable: keras.Variable) -> keras.Variable:
    """Let the variable keep its value when others than this package assign another one.

    The scale of a slot follows from the adapter in the slot. `set_weights` with weights from when
    another adapter was active, or a callback that changes all weights, would let the model compute
    with a scale that is the adapter's in no file.
    """
    vars(variable)["assign"] = partial(_assign_same, variable)
    return variable


def _assign_same(variable: keras.Variable, value: Any) -> Any:
    try:
        same = np.array_equal(np.asarray(value, variable.dtype), read(variable))
    except Exception:  # within a trace, or while a step of JAX has the value
        same = True
    if same:
        return type(variable).assign(variable, value)
    warn(
        "Expected the scale, dropout rate and DoRA switch of a slot to follow from the adapter in "
        "the slot. Received: other values, which are left out. Assign weights while the adapters "
        "are active that were active when the weights were taken; to scale, use scale_adapter."
    )
    return variable.value


class Factor:
    """A value of one adapter, at the adapter's own rank: `A`, `B`, the magnitude `m`, a bias.

    It reads as an array and has `assign`, whether it is parked or in a variable.
    """

    def __init__(self, value: Any, shape: Shape | None = None, dtype: str = "float32") -> None:
        """From an array, or from an initializer and a shape: then drawn when first needed."""
        drawn = shape is not None
        self.dtype = dtype
        self._draw: Callable[..., Tensor] | None = value if drawn else None
        self._parked: Tensor | None = None if drawn else self._copied(value)
        self._variable: keras.Variable | None = None
        self._fills = True
        self.shape: Shape = np.shape(value) if shape is None else shape

    @classmethod
    def inside(cls, variable: keras.Variable) -> Factor:
        """A factor that is in a variable, with the variable's present value."""
        factor = cls(variable, tuple(variable.shape), str(variable.dtype))
        factor.start(variable)
        return factor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(ops.convert_to_numpy(self._value()), dtype, copy=True)

    def assign(self, value: Any) -> None:
        """Raises:
        ValueError: another shape.
        """
        value = self._copied(ops.convert_to_numpy(value))
        if value.shape != self.shape:
            raise ValueError(f"Expected a factor of shape {self.shape}. Received: {value.shape}.")
        self._draw = None
        if self._variable is None:
            self._parked = value
        else:
            self._write(self._variable, value)

    def enter(self, variable: keras.Variable, fills: bool = True) -> None:
        """Put the values into a variable of the same rank (`fills`) or of a higher one."""
        value, dtype = self._value(), keras.backend.standardize_dtype(variable.dtype)
        if dtype != self.dtype:  # rows from a file, in a matrix of float64
            value, self.dtype = np.asarray(value, dtype), dtype
        self._fills = fills
        self._write(variable, value)
        self._parked, self._variable = None, variable

    def initializer(self, shape: Shape) -> Callable[..., Tensor]:
        """An initializer with these values; Keras may call it later, or within a graph."""
        if self._draw is not None and shape == self.shape:
            return self._draw
        value = self._padded(self._value(), shape)
        return lambda shape, dtype: ops.reshape(ops.convert_to_tensor(value, dtype), shape)

    def start(self, variable: keras.Variable) -> None:
        """Note that the values are in a variable that was made with `initializer`."""
        self._parked, self._draw, self._variable = None, None, variable
        self.dtype = keras.backend.standardize_dtype(variable.dtype)
        self._fills = tuple(variable.shape) == self.shape

    def leave(self) -> None:
        """Park the values. The variable keeps its present ones."""
        if self._variable is not None:
            self._parked, self._variable = self._value(), None

    def _value(self) -> Tensor:
        if self._draw is not None:
            self._parked = ops.convert_to_numpy(self._draw(self.shape, self.dtype))
            self._draw = None
        if self._variable is None:
            assert self._parked is not None
            return self._parked
        whole = read(self._variable)
        return whole if self._fills else ops.convert_to_numpy(whole)[self._part()].copy()

    def _copied(self, value: Any) -> np.ndarray:
        # Where a variable's memory is shared, a later step would change what was parked.
        return np.array(value, self.dtype, copy=True)

    def _write(self, variable: keras.Variable, value: Tensor) -> None:
        write(variable, value if self._fills else self._padded(value, variable.shape))

    def _padded(self, value: Tensor, shape: Any) -> Tensor:
        whole = np.zeros(shape, self.dtype)
        whole[self._part()] = value
        return whole

    def _part(self) -> tuple[slice, ...]:
        """The part of a variable of a higher rank that has the values."""
        return tuple(slice(size) for size in self.shape)
