"""An adapter of a model, and its part on one layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from keras_lora.config import DEFAULT_INIT, AdapterSpec, LoRAConfig
from keras_lora.layers.factors import Factor
from keras_lora.lowrank.equations import (
    EinsumSplit,
    Shape,
    Tensor,
    beside_counterpart,
    scaling,
)


@dataclass(eq=False)
class Adapter:
    """One adapter of a model: what its parts on all layers have in common.

    Attributes:
        config: The config that `apply_lora` was given; None if it was made another way.
        trained: The variables of the base that train with it: selected biases, `layers_to_save`.
        peft_prefix: The beginning of the names in the files of PEFT that it came from.
    """

    config: LoRAConfig | None
    trained: list[keras.Variable] = field(default_factory=list)
    peft_prefix: str | None = None


@dataclass(eq=False)
class LayerAdapter:
    """An adapter's part on one matrix.

    Attributes:
        spec: Rank, scale and options.
        a: The factor `A`.
        b: The factor `B`.
        magnitude: DoRA's `m`; None without DoRA.
        adapter: The adapter that this is a part of; None on a layer that was made by hand.
        scale_factor: What `scale_adapter` multiplies the scale `s` by.
        counterpart: `A0` and `B0` of a start whose `A0 B0` is taken off again; they never train.
        tokens: The rows `R` of `train_tokens`, `(tokens, dim)`; None without any.
    """

    spec: AdapterSpec
    a: Factor
    b: Factor
    magnitude: Factor | None = None
    adapter: Adapter | None = None
    scale_factor: float = 1.0
    counterpart: tuple[Factor, Factor] | None = None
    tokens: Factor | None = None

    @property
    def acting_spec(self) -> AdapterSpec:
        """The spec of an adapter that does the same with a scale factor of 1."""
        return dataclasses.replace(self.spec, alpha=self.spec.alpha * self.scale_factor)

    @property
    def scaling(self) -> float:
        # Making and checking a new spec at each switch would cost more than moving the values.
        return (self.spec if self.scale_factor == 1 else self.acting_spec).scaling

    @property
    def named_factors(self) -> dict[str, Factor]:
        """`A`, `B`, `m`, rows of tokens and the counterpart, under their names in files."""
        every = *self.factors, *(self.counterpart or ())
        return dict(zip(factor_names(self.spec), every, strict=True))

    @property
    def factors(self) -> tuple[Factor, ...]:
        """`A`, `B` and, where the adapter has them, `m` and rows of tokens."""
        others = self.magnitude, self.tokens
        return (self.a, self.b, *(factor for factor in others if factor is not None))

    def ordinary(self, rank_axis: int) -> LayerAdapter:
        """The same update as ordinary LoRA: of twice the rank where there is a counterpart.

        `rank_axis` is where the rank is among the axes of `B`.
        """
        if self.counterpart is None:
            return self
        spec, (a0, b0) = self.spec, map(np.array, self.counterpart)
        pair = np.array(self.a), np.array(self.b)
        a, b = beside_counterpart(pair, (a0, b0), rank_axis, np.concatenate)
        alpha = spec.scaling / scaling(1.0, 2 * spec.rank, spec.use_rslora)
        spec = dataclasses.replace(spec, rank=2 * spec.rank, alpha=alpha, init=DEFAULT_INIT)
        return dataclasses.replace(self, spec=spec, a=Factor(a), b=Factor(b), counterpart=None)

    @property
    def trained(self) -> tuple[Factor, ...]:
        """The values that train while the adapter does."""
        return self.factors[1:] if self.spec.freeze_a else self.factors

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(factor.shape)) for factor in self.factors)


def layer_adapter(
    spec: AdapterSpec, factors: Sequence[Any], adapter: Adapter | None = None
) -> LayerAdapter:
    """An adapter's part with these values, in the order of their names; in no bank yet."""
    values = [x if isinstance(x, Factor) else Factor(x) for x in factors]
    named = dict(zip(factor_names(spec), values, strict=True))
    counterpart = (named["a0"], named["b0"]) if spec.has_counterpart else None
    part = LayerAdapter(spec, named["a"], named["b"], named.get("magnitude"), adapter)
    return dataclasses.replace(part, counterpart=counterpart, tokens=named.get("tokens"))


def drawn_factors(
    shapes: Mapping[str, Shape], draws: Mapping[str, Callable[..., Tensor]], wide_dtype: str
) -> list[Factor]:
    """Factors of these shapes by name, drawn when first needed, as the matrix is at that moment.

    Factors have 32 bits; rows of tokens, which replace rows of `W0`, are as wide as its sums. A
    counterpart is drawn as its factors are.
    """
    dtypes = {"tokens": wide_dtype}
    return [
        Factor(draws[which.removesuffix("0")], shape, dtypes.get(which, "float32"))
        for which, shape in shapes.items()
    ]


def factor_names(spec: AdapterSpec) -> tuple[str, ...]:
    others = {"magnitude": spec.use_dora, "tokens": bool(spec.train_tokens)}
    found = [name for name, has in others.items() if has]
    return ("a", "b", *found, *(("a0", "b0") if spec.has_counterpart else ()))


def adapter_shapes(split: EinsumSplit, kernel_shape: Shape, spec: AdapterSpec) -> list[Shape]:
    """The shapes of the factors, in the order of their names."""
    pair = split.factor_shapes(kernel_shape, spec.rank)
    norms = [split.norm_shape(kernel_shape)] if spec.use_dora else []
    rows = [(len(spec.train_tokens), *kernel_shape[1:])] if spec.train_tokens else []
    return [*pair, *norms, *rows, *(pair if spec.has_counterpart else ())]
