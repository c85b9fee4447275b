"""Where the factors of an adapter are: aside, as arrays, or in a slot that the layer computes with.

What a model has compiled reads the variables of slots, never those of an adapter. To switch is to
move values into the slots: nothing is traced again, and however many adapters a layer has, it
computes with those that act. An adapter of a lower rank than its slot is padded with zeros. They
stay zero in training, since the gradient of each padded factor is a product with the other one.
Likewise a slot with a magnitude takes an adapter without: its gain is 1 then.

Switching is all but these reads and writes, so on TensorFlow they go past Keras, to the
`tf.Variable` itself: `Variable.assign` converts, casts and reads the variable back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.lowrank.equations import EinsumSplit, Shape, Tensor

NewVariable = Callable[..., keras.Variable]


def read(variable: keras.Variable) -> Tensor:
    """The present value, in the host's memory, which no later step changes."""
    if keras.backend.backend() != "tensorflow":
        return np.array(ops.convert_to_numpy(variable), copy=True)
    # The variable's own memory: TensorFlow lets go of it, or copies it, before it writes.
    value = variable.value.value()
    return value if "CPU" in value.device else value.numpy()


def write(variable: keras.Variable, value: Any) -> None:
    """Give a variable a value that is as the variable is, in shape and dtype."""
    if keras.backend.backend() == "tensorflow":
        variable.value.assign(value, read_value=False)
    else:
        variable.assign(value)


def _set(variable: keras.Variable, number: float) -> None:
    # Most adapters have the same scale, and to read takes half as long as to write.
    if float(read(variable)) != np.dtype(variable.dtype).type(number):
        write(variable, number)


class Factor:
    """`A`, `B` or the magnitude `m` of one adapter, float32, at the adapter's own rank.

    Reads as an array and is assigned as a variable is, wherever its values are now.
    """

    dtype = "float32"

    def __init__(self, value: Any, shape: Shape | None = None) -> None:
        """Of an array, or of an initializer and a shape: then it is drawn when it is needed."""
        drawn = shape is not None
        self._draw: Callable[..., Tensor] | None = value if drawn else None
        # Copies: where a variable's memory is shared, a later step would change what was parked.
        self._parked: Tensor | None = None if drawn else np.array(value, "float32", copy=True)
        self._variable: keras.Variable | None = None
        self._fills = True
        self.shape: Shape = np.shape(value) if shape is None else shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(ops.convert_to_numpy(self._value()), dtype, copy=True)

    def assign(self, value: Any) -> None:
        """Raises:
        ValueError: another shape.
        """
        value = np.array(ops.convert_to_numpy(value), "float32", copy=True)
        if value.shape != self.shape:
            raise ValueError(f"Expected a factor of shape {self.shape}. Received: {value.shape}.")
        self._draw = None
        if self._variable is None:
            self._parked = value
        else:
            self._write(self._variable, value)

    def enter(self, variable: keras.Variable, fills: bool) -> None:
        """Put the values into a slot's variable, of the same rank (`fills`) or a higher one."""
        value = self._value()
        self._fills = fills
        self._write(variable, value)
        self._parked, self._variable = None, variable

    def initializer(self, shape: Shape) -> Callable[..., Tensor]:
        """Gives a new variable these values; Keras may call it later, or within a graph."""
        if self._draw is not None and shape == self.shape:
            return self._draw
        value = self._padded(self._value(), shape)
        return lambda shape, dtype: ops.reshape(ops.convert_to_tensor(value, dtype), shape)

    def start(self, variable: keras.Variable) -> None:
        """Be in a variable that has these values from its start, by `initializer`."""
        self._parked, self._draw, self._variable = None, None, variable
        self._fills = tuple(variable.shape) == self.shape

    def leave(self) -> None:
        """Take the values aside. The slot keeps what it has."""
        if self._variable is not None:
            self._parked, self._variable = self._value(), None

    def _value(self) -> Tensor:
        if self._draw is not None:
            self._parked = ops.convert_to_numpy(self._draw(self.shape, "float32"))
            self._draw = None
        if self._variable is None:
            assert self._parked is not None
            return self._parked
        whole = read(self._variable)
        return whole if self._fills else ops.convert_to_numpy(whole)[self._part()].copy()

    def _write(self, variable: keras.Variable, value: Tensor) -> None:
        write(variable, value if self._fills else self._padded(value, variable.shape))

    def _padded(self, value: Tensor, shape: Any) -> Tensor:
        whole = np.zeros(shape, "float32")
        whole[self._part()] = value
        return whole

    def _part(self) -> tuple[slice, ...]:
        """Where the values are in a variable of a higher rank."""
        return tuple(slice(size) for size in self.shape)


@dataclass(eq=False)
class Adapter:
    """What the adapters of one name have in common, over all layers of a model.

    `config` is what `apply_lora` was given; None where the adapter was made otherwise. `trained`
    are variables of the base that train with it: selected biases, `layers_to_save`.
    """

    config: LoRAConfig | None
    trained: list[keras.Variable] = field(default_factory=list)


@dataclass(eq=False)
class LayerAdapter:
    """One adapter of one layer: its spec, its factors, and what multiplies its delta."""

    spec: AdapterSpec
    a: Factor
    b: Factor
    magnitude: Factor | None = None
    adapter: Adapter | None = None
    scale_factor: float = 1.0

    @property
    def acting_spec(self) -> AdapterSpec:
        """The spec of an adapter that does the same at scale_factor 1."""
        return dataclasses.replace(self.spec, alpha=self.spec.alpha * self.scale_factor)

    @property
    def scaling(self) -> float:
        # Not to make a spec, and check it, at each switch.
        return (self.spec if self.scale_factor == 1 else self.acting_spec).scaling

    @property
    def named_factors(self) -> dict[str, Factor]:
        """`A`, `B` and, for DoRA, `m`, under the names that files have for them."""
        return dict(zip(factor_names(self.spec), self.factors, strict=True))

    @property
    def factors(self) -> tuple[Factor, ...]:
        """What trains: `A`, `B` and, for DoRA, `m`."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(factor.shape)) for factor in self.factors)


def factor_names(spec: AdapterSpec) -> tuple[str, ...]:
    return ("a", "b", "magnitude") if spec.use_dora else ("a", "b")


def adapter_shapes(split: EinsumSplit, kernel_shape: Shape, spec: AdapterSpec) -> list[Shape]:
    """Of the factors, in the order of their names."""
    norms = [split.norm_shape(kernel_shape)] if spec.use_dora else []
    return [*split.factor_shapes(kernel_shape, spec.rank), *norms]


@dataclass(eq=False)
class Magnitude:
    """What a slot has for adapters of DoRA: `m`, and whether it acts (1 or 0)."""

    values: keras.Variable
    acts: keras.Variable

    @classmethod
    def make(cls, new: NewVariable, suffix: str, adapter: LayerAdapter, shape: Shape) -> Magnitude:
        m = adapter.magnitude
        start = "zeros" if m is None else m.initializer(shape)
        acts = keras.initializers.Constant(adapter.spec.use_dora)
        return cls(
            new(f"lora_magnitude{suffix}", shape, start, True),
            new(f"lora_dora{suffix}", (), acts, False),
        )

    def gain(
        self, split: EinsumSplit, w: Tensor, squared: keras.Variable, a: Tensor, b: Tensor
    ) -> Tensor:
        """`g` of each output in the dtype of `squared`; 1 for an adapter without DoRA."""
        dtype = squared.dtype
        a, b, m = (ops.cast(v, dtype) for v in (a, b, self.values))
        gain = split.gain(w, ops.convert_to_tensor(squared), a, b, m)
        return ops.where(ops.cast(self.acts, "bool"), gain, 1)


@dataclass(eq=False)
class Slot:
    """Variables of one adapter's shape: `A`, `B`, the scale `s`, the dropout rate; for DoRA `m`."""

    a: keras.Variable
    b: keras.Variable
    scaling: keras.Variable
    rate: keras.Variable
    rank: int
    magnitude: Magnitude | None = None
    adapter: LayerAdapter | None = None

    @classmethod
    def make(
        cls, new: NewVariable, index: int, adapter: LayerAdapter, shapes: Sequence[Shape]
    ) -> Slot:
        """Make variables of these shapes with `new(name, shape, initializer, trainable)`.

        They start with an adapter's values; it is not in the slot before `start`. A third shape
        is that of the magnitude.
        """
        suffix, (a, b, *m) = f"_{index}" if index else "", shapes
        scaling = keras.initializers.Constant(adapter.scaling)
        rate = keras.initializers.Constant(adapter.spec.dropout)
        return cls(
            new(f"lora_a{suffix}", a, adapter.a.initializer(a), True),
            new(f"lora_b{suffix}", b, adapter.b.initializer(b), True),
            new(f"lora_scaling{suffix}", (), scaling, False),
            new(f"lora_dropout{suffix}", (), rate, False),
            a[-1],
            Magnitude.make(new, suffix, adapter, m[0]) if m else None,
        )

    def start(self, adapter: LayerAdapter) -> None:
        """Take in the adapter that the slot was made for."""
        self.adapter = adapter
        for factor, variable in zip(adapter.factors, self.factors, strict=False):
            factor.start(variable)

    def takes(self, spec: AdapterSpec) -> bool:
        """Whether such an adapter can be in this slot."""
        return spec.rank <= self.rank and (self.magnitude is not None or not spec.use_dora)

    @property
    def factors(self) -> tuple[keras.Variable, ...]:
        """What trains."""
        pair = self.a, self.b
        return pair if self.magnitude is None else (*pair, self.magnitude.values)

    def scaled_b(self, dtype: str) -> Tensor:
        """`s B`: of the factors, `B` is the one whose scale costs least."""
        return ops.cast(self.scaling, dtype) * ops.cast(self.b, dtype)

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        acts = () if self.magnitude is None else (self.magnitude.acts,)
        return *self.factors, self.scaling, self.rate, *acts

    def put(self, adapter: LayerAdapter, has_dropout: bool) -> None:
        """Take an adapter in; `has_dropout` is whether the layer reads the dropout rate at all."""
        self.adapter, fills = adapter, adapter.spec.rank == self.rank
        for factor, variable in zip(adapter.factors, self.factors, strict=False):
            factor.enter(variable, fills or factor is adapter.magnitude)
        if self.magnitude is not None and adapter.magnitude is None:
            _zero(self.magnitude.values)
        self.refresh(has_dropout)

    def refresh(self, has_dropout: bool = True) -> None:
        """Take scale and dropout rate from the adapter in the slot; zeros where none is."""
        if self.adapter is None:
            self.clear()
            return
        _set(self.scaling, self.adapter.scaling)
        if has_dropout:
            _set(self.rate, self.adapter.spec.dropout)
        if self.magnitude is not None:
            _set(self.magnitude.acts, self.adapter.spec.use_dora)

    def park(self) -> None:
        """Take the adapter out; the slot's values stay, and count until `put` or `clear`."""
        if self.adapter is not None:
            for factor in self.adapter.factors:
                factor.leave()
        self.adapter = None

    def clear(self) -> None:
        """Zeros: the slot adds nothing, and no gradient reaches it."""
        for variable in self.variables:
            _zero(variable)


def _zero(variable: keras.Variable) -> None:
    write(variable, np.zeros(variable.shape, variable.dtype))


def dropped(x: Tensor, rate: Tensor, seeds: keras.random.SeedGenerator) -> Tensor:
    """Inverted dropout with a rate that may change without a new trace.

    `keras.random.dropout` takes the rate as a constant.
    """
    keep = 1 - ops.cast(rate, "float32")
    mask = keras.random.uniform(ops.shape(x), dtype="float32", seed=seeds) < keep
    return ops.where(mask, x / ops.cast(keep, x.dtype), ops.zeros((), x.dtype))
