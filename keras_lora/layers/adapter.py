"""An adapter of a model, and its part on one layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import keras
import numpy as np

from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.layers.factors import Factor
from keras_lora.lowrank.equations import EinsumSplit, Shape


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
    """

    spec: AdapterSpec
    a: Factor
    b: Factor
    magnitude: Factor | None = None
    adapter: Adapter | None = None
    scale_factor: float = 1.0

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
        """`A`, `B` and, for DoRA, `m`, under their names in files."""
        return dict(zip(factor_names(self.spec), self.factors, strict=True))

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The values that train: `A`, `B` and, for DoRA, `m`."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(factor.shape)) for factor in self.factors)


def factor_names(spec: AdapterSpec) -> tuple[str, ...]:
    return ("a", "b", "magnitude") if spec.use_dora else ("a", "b")


def adapter_shapes(split: EinsumSplit, kernel_shape: Shape, spec: AdapterSpec) -> list[Shape]:
    """The shapes of the factors, in the order of their names."""
    norms = [split.norm_shape(kernel_shape)] if spec.use_dora else []
    return [*split.factor_shapes(kernel_shape, spec.rank), *norms]
