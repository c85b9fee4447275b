"""Starts from what a model computes on a few batches of data, or from another model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.initializers.spectral import Array, padded, randomized_svd, together
from keras_lora.initializers.starts import FrozenMatrix, Measure, Start, Started
from keras_lora.lowrank.decomposing import balanced
from keras_lora.lowrank.equations import Shape, Tensor

_STABLE = 16  # the authors' gamma
_ITERATIONS = 4


@final
@dataclass(frozen=True)
class EVA(Start):
    """`A` along the directions in which the inputs vary most, `B` zero.

        X = U S V^T      A0 = V_r   (d, r), with orthonormal columns      B0 = 0

    `X` `(n, d)` are the inputs of the layer on the data. Every layer keeps its rank: the paper's
    redistribution of ranks is that of `rho = 1`.

    Reference: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained
    Variance Adaptation", https://arxiv.org/abs/2410.07170, section 3.
    """

    measures: ClassVar[Measure | None] = "inputs"

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:  # noqa: ARG002
        inputs = _measured(w, "eva")
        if inputs.shape[1] < min(rank, w.shape[1]):
            received = f"{inputs.shape[1]} inputs at rank {rank}"
            raise invalid("data", "at least as many inputs as the rank", received)

        def a(shape: Shape, dtype: str) -> Tensor:
            _, _, v = np.linalg.svd(inputs, full_matrices=False)
            directions = padded(v[:, :rank], 1, rank)
            return ops.convert_to_tensor(directions.swapaxes(1, 2).reshape(shape), dtype)

        return Started(a, keras.initializers.Zeros())


@final
@dataclass(frozen=True)
class LoRAGA(Start):
    """Directions in which the first step follows the step of full fine-tuning.

        G = U S V^T      A0 = c U_r      B0 = c V_(r+1..2r)^T      c = k^(1/4) / sqrt(16)

    `G` `(d, k)` is the gradient of the loss with respect to `W0` on the data; `A0 B0` is taken off
    again. The first step changes `W` by `-rate s^2 (G B0^T B0 + A0 A0^T G)`, of rank `2r`: of all
    factors of these sizes, these are nearest to `-rate G` in direction.

    Reference: Wang, Yu and Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    https://arxiv.org/abs/2407.05000, section 3 and algorithm 1. `c`, and which singular vectors go
    to which factor, are as in the authors' code, https://github.com/Outsider565/LoRA-GA:
    `direction="ArB2r"`, `scale="stable"`, `stable_gamma=16` in `reinit_lora`. PEFT differs: it
    multiplies `B0` alone by `c`, and by the singular values.
    """

    has_counterpart: ClassVar[bool] = True
    measures: ClassVar[Measure | None] = "gradient"

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:  # noqa: ARG002
        gradient, size = _measured(w, "lora_ga"), w.shape[2] ** 0.25 / math.sqrt(_STABLE)
        normal = keras.initializers.RandomNormal(stddev=1.0)

        def pair() -> tuple[Array, Array]:
            u, _, v = randomized_svd(gradient, 2 * rank, _ITERATIONS, normal)
            return size * u[..., :rank], size * v[:, rank : 2 * rank]

        return together(rank, pair)


@final
@dataclass(frozen=True)
class LoftQ(Start):
    """The best correction of a quantized `W0`: most of what rounding to integers took from `W`.

        W - W0 = U S V^T      A0 = U_r sqrt(S_r / s)      B0 = sqrt(S_r / s) V_r^T

    so that `|W - (W0 + s A0 B0)|` is the least that rank `r` allows. Nothing is taken off again: a
    fresh adapter is nearer to the model in floating point than its base is. The paper goes on to
    round `W - s A0 B0` anew; here `W0` never changes, which is its algorithm 1 with `T = 1`.

    Reference: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language
    Models", https://arxiv.org/abs/2310.08659, section 3.2 and algorithm 1.
    """

    measures: ClassVar[Measure | None] = "weights"

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:
        given = _measured(w, "loftq")

        def pair() -> tuple[Array, Array]:
            lost = given() - ops.convert_to_numpy(w.values())
            return balanced(*np.linalg.svd(lost, full_matrices=False), rank, scaling)

        return together(rank, pair)


def _measured(w: FrozenMatrix, init: str) -> Any:
    if w.measured is None:
        raise invalid(
            "init",
            "a start that needs no data, for a layer made by hand",
            init,
            "build the layer and call apply_lora(model, config, data=...)",
        )
    return w.measured
