"""Where the factors of an adapter are: aside, as arrays, or in a slot that the layer computes with.

What a model has compiled reads the variables of slots, never those of an adapter. To switch is to
move values into the slots: nothing is traced again, and however many adapters a layer has, it
computes with those that act. An adapter of a lower rank than its slot is padded with zeros. They
stay zero in training, since the gradient of each padded factor is a product with the other one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.lowrank import Shape, Tensor

NewVariable = Callable[..., keras.Variable]


class Factor:
    """`A` or `B` of one adapter, float32, at the adapter's own rank.

    Reads as an array and is assigned as a variable is, wherever its values are now.
    """

    dtype = "float32"

    def __init__(self, value: Any, rank_axis: int) -> None:
        # Copies: where a variable's memory is shared, a later step would change what was parked.
        self._parked: np.ndarray | None = np.array(value, "float32", copy=True)
        self._variable: keras.Variable | None = None
        self._rank_axis = rank_axis
        self.shape: Shape = self._parked.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._value(), dtype, copy=True)

    def assign(self, value: Any) -> None:
        """Raises:
        ValueError: another shape.
        """
        value = np.array(ops.convert_to_numpy(value), "float32", copy=True)
        if value.shape != self.shape:
            raise ValueError(f"Expected a factor of shape {self.shape}. Received: {value.shape}.")
        if self._variable is None:
            self._parked = value
        else:
            self._variable.assign(self._padded(value))

    def enter(self, variable: keras.Variable) -> None:
        """Put the values into a slot's variable, of the same or a higher rank."""
        value = self._value()
        self._parked, self._variable = None, variable
        self.assign(value)

    def leave(self) -> None:
        """Take the values aside. The slot keeps what it has."""
        if self._variable is not None:
            self._parked, self._variable = self._value(), None

    def _value(self) -> np.ndarray:
        if self._variable is None:
            assert self._parked is not None
            return self._parked
        whole = np.array(ops.convert_to_numpy(self._variable), copy=True)
        return whole[self._at_rank(slice(self.shape[self._rank_axis]))]

    def _padded(self, value: np.ndarray) -> np.ndarray:
        assert self._variable is not None
        whole = np.zeros(self._variable.shape, "float32")
        whole[self._at_rank(slice(self.shape[self._rank_axis]))] = value
        return whole

    def _at_rank(self, part: slice) -> tuple[slice, ...]:
        everything = [slice(None)] * len(self.shape)
        everything[self._rank_axis] = part
        return tuple(everything)


@dataclass(eq=False)
class Group:
    """What the adapters of one name have in common, over all layers of a model.

    `config` is what `apply_lora` was given; None where the adapter was made otherwise. `trained`
    are variables of the base that train with it: selected biases, `layers_to_save`.
    """

    config: LoRAConfig | None
    trained: list[keras.Variable] = field(default_factory=list)


@dataclass(eq=False)
class Adapter:
    """One adapter of one layer: its spec, its two factors, and what multiplies its delta."""

    spec: AdapterSpec
    a: Factor
    b: Factor
    group: Group | None = None
    strength: float = 1.0

    @property
    def acting_spec(self) -> AdapterSpec:
        """The spec of an adapter that does the same at strength 1."""
        return dataclasses.replace(self.spec, alpha=self.spec.alpha * self.strength)

    @property
    def scaling(self) -> float:
        return self.acting_spec.scaling

    @property
    def factors(self) -> tuple[Factor, Factor]:
        return self.a, self.b

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(factor.shape)) for factor in self.factors)


@dataclass(eq=False)
class Slot:
    """Variables of one adapter's shape: `A`, `B`, and of it the scale `s` and the dropout rate."""

    a: keras.Variable
    b: keras.Variable
    scaling: keras.Variable
    rate: keras.Variable
    rank: int
    holds: Adapter | None = None

    @classmethod
    def make(cls, new: NewVariable, index: int, shapes: tuple[Shape, Shape], rank: int) -> Slot:
        """Make the variables with `new(name, shape, trainable)`; the slot is empty."""
        suffix = f"_{index}" if index else ""
        return cls(
            new(f"lora_a{suffix}", shapes[0], True),
            new(f"lora_b{suffix}", shapes[1], True),
            new(f"lora_scaling{suffix}", (), False),
            new(f"lora_dropout{suffix}", (), False),
            rank,
        )

    @property
    def factors(self) -> tuple[keras.Variable, keras.Variable]:
        return self.a, self.b

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        return self.a, self.b, self.scaling, self.rate

    def put(self, adapter: Adapter) -> None:
        self.holds = adapter
        adapter.a.enter(self.a)
        adapter.b.enter(self.b)
        self.refresh()

    def refresh(self) -> None:
        """Take scale and dropout rate from the adapter that is held; zeros where none is."""
        if self.holds is None:
            self.clear()
            return
        self.scaling.assign(self.holds.scaling)
        self.rate.assign(self.holds.spec.dropout)

    def park(self) -> None:
        """Take the adapter out; the slot's values stay, and count until `put` or `clear`."""
        if self.holds is not None:
            for factor in self.holds.factors:
                factor.leave()
        self.holds = None

    def clear(self) -> None:
        """Zeros: the slot adds nothing, and no gradient reaches it."""
        for variable in self.variables:
            variable.assign(ops.zeros(variable.shape, variable.dtype))


def dropped(x: Tensor, rate: Tensor, seeds: keras.random.SeedGenerator) -> Tensor:
    """Inverted dropout with a rate that may change without a new trace.

    `keras.random.dropout` takes the rate as a constant.
    """
    keep = 1 - ops.cast(rate, "float32")
    mask = keras.random.uniform(ops.shape(x), dtype="float32", seed=seeds) < keep
    return ops.where(mask, x / ops.cast(keep, x.dtype), ops.zeros((), x.dtype))
