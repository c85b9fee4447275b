"""Slots: the variables that a layer computes with, which adapters move into and out of.

Compiled functions read the variables of slots alone. To switch adapters is to move values into the
slots: nothing is traced again, and however many adapters a layer has, it computes with the active
ones alone. An adapter of a lower rank than its slot is padded with zeros. The scale of the padding
is zero too: no value there acts, whoever writes it, and training by an optimizer that goes by
element leaves the zeros, since they get no gradient.
Likewise a slot with a magnitude takes an adapter without DoRA: its gain is 1 then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.config import AdapterSpec
from keras_lora.layers.adapter import LayerAdapter
from keras_lora.layers.factors import Factor, protected, read, write
from keras_lora.layers.groups import in_group
from keras_lora.lowrank.equations import EinsumSplit, Shape, Tensor

NewVariable = Callable[..., keras.Variable]


def _set(variable: keras.Variable, value: Any) -> None:
    # Most adapters have the same scale, and a read takes half as long as a write.
    value = np.asarray(value, variable.dtype)
    if not np.array_equal(read(variable), value):
        write(variable, value)


@dataclass(eq=False)
class Magnitude:
    """What a slot has for adapters with DoRA: `m`, and whether it applies (1 or 0)."""

    values: keras.Variable
    active: keras.Variable

    @classmethod
    def make(cls, new: NewVariable, suffix: str, adapter: LayerAdapter, shape: Shape) -> Magnitude:
        m = adapter.magnitude
        start = "zeros" if m is None else m.initializer(shape)
        active = keras.initializers.Constant(adapter.spec.use_dora)
        return cls(
            in_group(new(f"lora_magnitude{suffix}", shape, start, True), "magnitudes"),
            protected(new(f"lora_dora{suffix}", (), active, False)),
        )

    def gain(
        self, split: EinsumSplit, w: Tensor, squared: keras.Variable, a: Tensor, b: Tensor
    ) -> Tensor:
        """`g` of each output in the dtype of `squared`; 1 for an adapter without DoRA."""
        dtype = squared.dtype
        a, b, m = (ops.cast(v, dtype) for v in (a, b, self.values))
        gain = split.gain(w, ops.convert_to_tensor(squared), a, b, m)
        return ops.where(ops.cast(self.active, "bool"), gain, 1)


@dataclass(frozen=True)
class Room:
    """What the slots of a matrix have room for: all that was ever active, and not only what is.

    Attributes:
        ranks: The rank of each slot.
        use_dora: Whether each has a magnitude.
        dropout: Whether dropout is part of the computation.
        trainable: Whether the slots train.
    """

    ranks: Sequence[int]
    use_dora: Sequence[bool]
    dropout: bool
    trainable: bool

    @property
    def specs(self) -> list[AdapterSpec]:
        """Specs of adapters that fill the slots."""
        dropout = 0.5 if self.dropout else 0.0
        return [
            AdapterSpec(rank=rank, alpha=rank, dropout=dropout, use_dora=use_dora)
            for rank, use_dora in zip(self.ranks, self.use_dora, strict=True)
        ]


@dataclass(eq=False)
class Slot:
    """Variables of one adapter's shape: `A`, `B`, the scale `s`, the dropout rate; for DoRA `m`.

    The scale has an entry for each column of `A`, which is zero where the slot is padded. `adapter`
    is the adapter whose values are in the variables, or None.
    """

    a: keras.Variable
    b: keras.Variable
    scaling: keras.Variable
    rate: keras.Variable
    rank: int
    magnitude: Magnitude | None = None
    adapter: LayerAdapter | None = None

    @classmethod
    def make(
        cls,
        new: NewVariable,
        index: int,
        adapter: LayerAdapter,
        shapes: Sequence[Shape],
        rank_axis: int,
    ) -> Slot:
        """Make variables of these shapes with `new(name, shape, initializer, trainable)`.

        They start with the adapter's values, but the adapter is not in the slot before `start`. A
        third shape is that of the magnitude; `rank_axis` is where the rank is among the axes of B.
        """
        suffix, (a, b, *m) = f"_{index}" if index else "", shapes
        columns = tuple(size if axis == rank_axis else 1 for axis, size in enumerate(b))
        scales = _scales(adapter, columns)
        rate = keras.initializers.Constant(adapter.spec.dropout)
        return cls(
            in_group(new(f"lora_a{suffix}", a, adapter.a.initializer(a), True), "a"),
            in_group(new(f"lora_b{suffix}", b, adapter.b.initializer(b), True), "b"),
            protected(new(f"lora_scaling{suffix}", columns, _constant(scales), False)),
            protected(new(f"lora_dropout{suffix}", (), rate, False)),
            a[-1],
            Magnitude.make(new, suffix, adapter, m[0]) if m else None,
        )

    def start(self, adapter: LayerAdapter) -> None:
        """Note that the adapter that the slot was made for is in it."""
        self.adapter = adapter
        for factor, variable in zip(adapter.factors, self.factors, strict=False):
            factor.start(variable)

    def takes(self, spec: AdapterSpec, pads: bool) -> bool:
        """Whether an adapter of this spec can be in this slot, padded if `pads`."""
        fits = spec.rank == self.rank or (pads and spec.rank < self.rank)
        return fits and (self.magnitude is not None or not spec.use_dora)

    @property
    def is_padded(self) -> bool:
        return self.adapter is not None and self.adapter.spec.rank < self.rank

    @property
    def factors(self) -> tuple[keras.Variable, ...]:
        """The variables that train."""
        pair = self.a, self.b
        return pair if self.magnitude is None else (*pair, self.magnitude.values)

    @property
    def held(self) -> list[tuple[keras.Variable, Factor]]:
        """The variables that train with the factors of the adapter in them."""
        return list(zip(self.factors, self.adapter.factors, strict=False)) if self.adapter else []

    def update(
        self,
        split: EinsumSplit,
        w: Tensor,
        squared: keras.Variable | None,
        dtype: str,
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`A`, `g s B` with a magnitude, `g`; `g s B` is in `dtype`. `factor` multiplies `s`."""
        b = self.scaled_b(dtype) if factor == 1 else factor * self.scaled_b(dtype)
        if self.magnitude is None:
            return self.a, b, None
        assert squared is not None
        gain = self.magnitude.gain(split, w, squared, self.a, b)
        return self.a, split.times_gain(b, gain, split.b), gain

    def scaled_b(self, dtype: str) -> Tensor:
        """`s B` in `dtype`: scaling `B` costs less than scaling the product."""
        return ops.cast(self.scaling, dtype) * ops.cast(self.b, dtype)

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        active = () if self.magnitude is None else (self.magnitude.active,)
        return *self.factors, self.scaling, self.rate, *active

    def put(self, adapter: LayerAdapter, has_dropout: bool) -> None:
        """Move an adapter in; `has_dropout` is whether the layer reads the dropout rate at all."""
        self.adapter, fills = adapter, adapter.spec.rank == self.rank
        for factor, variable in zip(adapter.factors, self.factors, strict=False):
            factor.enter(variable, fills or factor is adapter.magnitude)
        if self.magnitude is not None and adapter.magnitude is None:
            _zero(self.magnitude.values)
        self.refresh(has_dropout)

    def refresh(self, has_dropout: bool = True) -> None:
        """Take scale and dropout rate from the adapter in the slot; zeros without an adapter."""
        if self.adapter is None:
            self.clear()
            return
        _set(self.scaling, _scales(self.adapter, tuple(self.scaling.shape)))
        if has_dropout:
            _set(self.rate, self.adapter.spec.dropout)
        if self.magnitude is not None:
            _set(self.magnitude.active, self.adapter.spec.use_dora)

    def park(self) -> None:
        """Move the adapter out. The slot's values stay in effect until `put` or `clear`."""
        if self.adapter is not None:
            for factor in self.adapter.factors:
                factor.leave()
        self.adapter = None

    def clear(self) -> None:
        """Set all variables to zero: the slot adds nothing and gets no gradient."""
        for variable in self.variables:
            _zero(variable)


def _scales(adapter: LayerAdapter, shape: Shape) -> np.ndarray:
    """The adapter's scale for its own columns, and zero for the padding."""
    scales = np.zeros(math.prod(shape))
    scales[: adapter.spec.rank] = adapter.scaling
    return scales.reshape(shape)


def _constant(value: np.ndarray) -> Callable[..., Tensor]:
    return lambda shape, dtype: ops.reshape(ops.convert_to_tensor(value, dtype), shape)


def _zero(variable: keras.Variable) -> None:
    write(variable, np.zeros(variable.shape, variable.dtype))


def dropped(x: Tensor, rate: Tensor, seeds: keras.random.SeedGenerator) -> Tensor:
    """Inverted dropout with a rate that may change without a new trace.

    `keras.random.dropout` takes the rate as a constant.
    """
    x = ops.convert_to_tensor(x, sparse=False)
    keep = 1 - ops.cast(rate, "float32")
    mask = keras.random.uniform(ops.shape(x), dtype="float32", seed=seeds) < keep
    return ops.where(mask, x / ops.cast(keep, x.dtype), ops.zeros((), x.dtype))
