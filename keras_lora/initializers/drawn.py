"""Starts that are drawn at random, whatever `W0` is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import keras
import numpy as np
from keras import ops

from keras_lora.initializers.starts import FrozenMatrix, Start, Started
from keras_lora.lowrank.equations import Shape, Tensor


@final
@dataclass(frozen=True)
class Uniform(Start):
    """`A` uniform within `±1/sqrt(d)` for `d` inputs, `B` zero.

    Reference: Hu et al. 2021, section 4.1; the bound is that of PEFT: He's (`kaiming_uniform`)
    with `a = sqrt(5)`.
    """

    yields: ClassVar[bool] = True

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:  # noqa: ARG002
        bound = 1 / math.sqrt(w.shape[1])
        return Started(keras.initializers.RandomUniform(-bound, bound), keras.initializers.Zeros())


@final
@dataclass(frozen=True)
class Gaussian(Start):
    """`A` normal with standard deviation `1/r`, `B` zero.

    Reference: Hu et al. 2021, section 4.1; the deviation is that of PEFT.
    """

    yields: ClassVar[bool] = True

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:  # noqa: ARG002
        return Started(keras.initializers.RandomNormal(stddev=1 / rank), keras.initializers.Zeros())


@final
@dataclass(frozen=True)
class Lookup(Start):
    """`A` zero and `B` standard normal: training first moves the rows of `A` of the tokens seen.

    Reference: PEFT and the authors' loralib, https://github.com/microsoft/LoRA.
    """

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:  # noqa: ARG002
        return Started(keras.initializers.Zeros(), keras.initializers.RandomNormal(stddev=1.0))


@final
@dataclass(frozen=True)
class Orthogonal(Start):
    """`A` and `B` both random, on orthogonal sides of the rank, so that `A B = 0`.

        A = N1 Q_odd / 10      B = Q_even^T N2 / 10      Q_odd Q_even^T = 0

    `Q` is a random orthogonal matrix `(r, r)`, of which `Q_odd` `(r - r // 2, r)` and `Q_even`
    `(r // 2, r)` are the rows; `N1` and `N2` are standard normal. Both factors train from the
    first step on, where with `B = 0` the gradient of `A` is zero.

    Reference: Datta, "Rethinking LoRA initialisation",
    https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation; the factor 1/10
    is that of PEFT.
    """

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:  # noqa: ARG002
        shared, d, k = w.shape
        turn = keras.initializers.Orthogonal()
        left, right = (keras.initializers.RandomNormal(stddev=0.1) for _ in range(2))

        def rows(first: int) -> np.ndarray:
            return ops.convert_to_numpy(turn((rank, rank), "float32")).astype("float64")[first::2]

        def a(shape: Shape, dtype: str) -> Tensor:
            normal = ops.convert_to_numpy(left((shared, d, rank - rank // 2), "float32"))
            return ops.convert_to_tensor((normal @ rows(0)).reshape(shape), dtype)

        def b(shape: Shape, dtype: str) -> Tensor:
            normal = ops.convert_to_numpy(right((shared, rank // 2, k), "float32"))
            return ops.convert_to_tensor((rows(1).T @ normal).reshape(shape), dtype)

        return Started(a, b)
