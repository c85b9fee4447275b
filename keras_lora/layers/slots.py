"""Slots: the variables that a layer computes with, which adapters move into and out of.

Compiled functions read the variables of slots alone. To switch adapters is to move values into the
slots: nothing is traced again, and however many adapters a layer has, it computes with the active
ones alone. An adapter of a lower rank than its slot is padded with zeros. The scale of the padding
is zero too: no value there acts, whoever writes it, and training by an optimizer that goes by
element leaves the zeros, since they get no gradient.
Likewise a slot with a magnitude takes an adapter without DoRA: its gain is 1 then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.config import DEFAULT_INIT, AdapterSpec
from keras_lora.layers.adapter import LayerAdapter
from keras_lora.layers.factors import Factor, protected, read, write
from keras_lora.layers.groups import in_group
from keras_lora.layers.token_rows import TokenRows
from keras_lora.lowrank.equations import EinsumSplit, Pair, Shape, Tensor, beside_counterpart

NewVariable = Callable[..., keras.Variable]

_WITH_COUNTERPART = "olora"  # in the spec of a slot: any start that has one


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
        counterparts: Whether each has room for a counterpart; none has in files of version 0.1.
        tokens: For how many rows of tokens each has room; none has in files of version 0.1.
    """

    ranks: Sequence[int]
    use_dora: Sequence[bool]
    dropout: bool
    trainable: bool
    counterparts: Sequence[bool] = ()
    tokens: Sequence[int] = ()

    @classmethod
    def of(cls, slots: Sequence[Slot], dropout: bool, trainable: bool) -> Room:
        return cls(
            [slot.rank for slot in slots],
            [slot.magnitude is not None for slot in slots],
            dropout,
            trainable,
            [slot.counterpart is not None for slot in slots],
            [slot.token_count for slot in slots],
        )

    @property
    def specs(self) -> list[AdapterSpec]:
        """Specs of adapters that fill the slots."""
        dropout = 0.5 if self.dropout else 0.0
        inits = [_WITH_COUNTERPART if c else DEFAULT_INIT for c in self.counterparts]
        inits += [DEFAULT_INIT] * (len(self.ranks) - len(inits))
        tokens = [*self.tokens, *[0] * (len(self.ranks) - len(self.tokens))]
        every = zip(self.ranks, self.use_dora, inits, map(range, tokens), strict=True)
        return [
            AdapterSpec(
                rank=r, alpha=r, dropout=dropout, use_dora=dora, init=init, train_tokens=rows
            )
            for r, dora, init, rows in every
        ]


@dataclass(eq=False)
class Slot:
    """Variables of one adapter's shape: `A`, `B`, the scale `s`, the dropout rate; for DoRA `m`.

    The scale has an entry for each column of `A`, which is zero where the slot is padded;
    `rank_axis` is where these are among its axes. `counterpart` are the variables of `A0` and `B0`,
    `tokens` those of the rows that train in full. `adapter` is the adapter whose values are in the
    variables, or None.
    """

    a: keras.Variable
    b: keras.Variable
    scaling: keras.Variable
    rate: keras.Variable
    rank_axis: int
    magnitude: Magnitude | None = None
    counterpart: tuple[keras.Variable, keras.Variable] | None = None
    tokens: TokenRows | None = None
    adapter: LayerAdapter | None = None

    @classmethod
    def make(
        cls,
        new: NewVariable,
        index: int,
        adapter: LayerAdapter,
        shapes: Mapping[str, Shape],
        rank_axis: int,
    ) -> Slot:
        """Make variables of these shapes with `new(name, shape, initializer, trainable)`.

        They start with the adapter's values, but the adapter is not in the slot before `start`.
        The shapes are given by the names of the factors; `rank_axis` is where the rank is among the
        axes of B.
        """
        suffix, a, b = f"_{index}" if index else "", shapes["a"], shapes["b"]
        columns = tuple(size if axis == rank_axis else 1 for axis, size in enumerate(b))
        scales = _scales(adapter, columns)
        rate = keras.initializers.Constant(adapter.spec.dropout)
        exact, m = "a0" in shapes, shapes.get("magnitude")
        return cls(
            in_group(new(f"lora_a{suffix}", a, adapter.a.initializer(a), True, exact=exact), "a"),
            in_group(new(f"lora_b{suffix}", b, adapter.b.initializer(b), True, exact=exact), "b"),
            protected(new(f"lora_scaling{suffix}", columns, _constant(scales), False)),
            protected(new(f"lora_dropout{suffix}", (), rate, False)),
            rank_axis,
            Magnitude.make(new, suffix, adapter, m) if m is not None else None,
            _made_counterpart(new, suffix, adapter, (a, b)) if exact else None,
            TokenRows.make(new, suffix, adapter, shapes["tokens"]) if "tokens" in shapes else None,
        )

    def start(self, adapter: LayerAdapter) -> None:
        """Note that the adapter that the slot was made for is in it."""
        self.adapter = adapter
        for variable, factor in self._pairs(adapter):
            factor.start(variable)

    def takes(self, spec: AdapterSpec, pads: bool) -> bool:
        """Whether an adapter of this spec can be in this slot, padded if `pads`."""
        sizes = (spec.rank, self.rank), (len(spec.train_tokens), self.token_count)
        # Without rows of its own, an adapter gives those of the slot no gradient.
        fits = all(own == size or ((pads or not own) and own < size) for own, size in sizes)
        fits = fits and (self.counterpart is not None or not spec.has_counterpart)
        return fits and (self.magnitude is not None or not spec.use_dora)

    def grown(self, spec: AdapterSpec, pads: bool) -> AdapterSpec:
        """The spec of a slot that takes this spec, and all that this slot took."""
        keeps = self.counterpart is not None and not spec.has_counterpart
        return dataclasses.replace(
            spec,
            rank=max(spec.rank, self.rank) if pads else spec.rank,
            train_tokens=self._grown_tokens(spec, pads),
            use_dora=spec.use_dora or self.magnitude is not None,
            init=_WITH_COUNTERPART if keeps else spec.init,
        )

    def _grown_tokens(self, spec: AdapterSpec, pads: bool) -> Sequence[int]:
        keeps = not spec.train_tokens or (pads and len(spec.train_tokens) < self.token_count)
        return range(self.token_count) if keeps else spec.train_tokens

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def token_count(self) -> int:
        """For how many rows of tokens there is room."""
        return 0 if self.tokens is None else self.tokens.size

    @property
    def is_padded(self) -> bool:
        spec = None if self.adapter is None else self.adapter.spec
        return spec is not None and (
            0 < spec.rank < self.rank or 0 < len(spec.train_tokens) < self.token_count
        )

    @property
    def factors(self) -> tuple[keras.Variable, ...]:
        """The variables of `A`, `B`, the magnitude and rows of tokens."""
        others = self.magnitude, self.tokens  # a kind has one of both at most
        return (self.a, self.b, *(part.values for part in others if part is not None))

    @property
    def held(self) -> list[tuple[keras.Variable, Factor]]:
        """The variables with the factors of the adapter in them."""
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
        a, b = self.pair(dtype)
        if factor != 1:
            b = factor * b
        if self.magnitude is None:
            return a, b, None
        assert squared is not None
        gain = self.magnitude.gain(split, w, squared, a, b)
        return a, split.times_gain(b, gain, split.b), gain

    def pair(
        self, dtype: str, part: Callable[[keras.Variable], Tensor] = ops.convert_to_tensor
    ) -> Pair:
        """`A`, or the `part` of it that is asked for, and `s B` in `dtype`.

        Beside a counterpart they are those of `A B - A0 B0`. Scaling `B` costs less than scaling
        the product.
        """

        def scaled(a: keras.Variable, b: keras.Variable) -> Pair:
            return part(a), ops.cast(self.scaling, dtype) * ops.cast(b, dtype)

        pair = scaled(self.a, self.b)
        if self.counterpart is None:
            return pair
        frozen = scaled(*self.counterpart)
        return beside_counterpart(pair, frozen, self.rank_axis, ops.concatenate)

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        active = () if self.magnitude is None else (self.magnitude.active,)
        ids = () if self.tokens is None else (self.tokens.ids,)
        return *self.factors, self.scaling, self.rate, *active, *ids, *(self.counterpart or ())

    def put(self, adapter: LayerAdapter, has_dropout: bool) -> None:
        """Move an adapter in; `has_dropout` is whether the layer reads the dropout rate at all."""
        self.adapter = adapter
        for variable, factor in self._pairs(adapter):
            factor.enter(variable, tuple(variable.shape) == factor.shape)
        if self.tokens is not None and adapter.tokens is None:
            _zero(self.tokens.values)
        if self.magnitude is not None and adapter.magnitude is None:
            _zero(self.magnitude.values)
        if adapter.counterpart is None:
            for variable in self.counterpart or ():
                _zero(variable)
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
        if self.tokens is not None:
            self.tokens.refresh(self.adapter.spec.train_tokens)

    def park(self) -> None:
        """Move the adapter out. The slot's values stay in effect until `put` or `clear`."""
        if self.adapter is not None:
            for _, factor in self._pairs(self.adapter):
                factor.leave()
        self.adapter = None

    def clear(self) -> None:
        """Set all variables to zero: the slot adds nothing and gets no gradient."""
        for variable in self.variables:
            _zero(variable)
        if self.tokens is not None:
            self.tokens.refresh(())

    def _pairs(self, adapter: LayerAdapter) -> list[tuple[keras.Variable, Factor]]:
        """The variables with the factors of an adapter that belong in them."""
        frozen = zip(self.counterpart or (), adapter.counterpart or (), strict=False)
        return [*zip(self.factors, adapter.factors, strict=False), *frozen]


def _made_counterpart(
    new: NewVariable, suffix: str, adapter: LayerAdapter, shapes: tuple[Shape, Shape]
) -> tuple[keras.Variable, keras.Variable]:
    pairs = zip(adapter.counterpart or (None, None), shapes, strict=True)
    left, right = ("zeros" if x is None else x.initializer(shape) for x, shape in pairs)
    return (
        new(f"lora_a0{suffix}", shapes[0], left, False, exact=True),
        new(f"lora_b0{suffix}", shapes[1], right, False, exact=True),
    )


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
