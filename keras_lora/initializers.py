"""How the factors `A` and `B` of an adapter begin.

`A` or `B` begins at zero, so that a fresh adapter computes what its base does. `W0` is not changed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import keras

from keras_lora.lowrank.equations import Shape, Tensor

# Called as `initializer(shape, dtype)`, when the factor is first needed.
Initializer = Callable[[Shape, str], Tensor]


@dataclass(frozen=True)
class FrozenMatrix:
    """What a start may know of `W0`, as a matrix for each index of its shared axes.

    Attributes:
        shape: `(shared, d, k)`: `d` inputs and `k` outputs.
        values: Gives `W0` in that shape, in float32 or wider; computed when it is called.
    """

    shape: tuple[int, int, int]
    values: Callable[[], Tensor]


@dataclass(frozen=True)
class Started:
    """How `A` and `B` begin.

    Attributes:
        a: The initializer of `A`.
        b: The initializer of `B`.
    """

    a: Initializer
    b: Initializer


class Start(ABC):
    """Abstract: a way to begin the factors of an adapter."""

    @abstractmethod
    def started(self, w: FrozenMatrix, rank: int) -> Started:
        """How `A`, `(d, rank)` as a matrix, and `B`, `(rank, k)`, begin."""


@final
@dataclass(frozen=True)
class Uniform(Start):
    """`A` uniform within `±1/sqrt(d)` for `d` inputs, `B` zero.

    Reference: Hu et al. 2021, section 4.1; the bound is that of PEFT: He's (`kaiming_uniform`)
    with `a = sqrt(5)`.
    """

    def started(self, w: FrozenMatrix, rank: int) -> Started:  # noqa: ARG002
        bound = 1 / math.sqrt(w.shape[1])
        return Started(keras.initializers.RandomUniform(-bound, bound), keras.initializers.Zeros())


@final
@dataclass(frozen=True)
class Gaussian(Start):
    """`A` normal with standard deviation `1/r`, `B` zero.

    Reference: Hu et al. 2021, section 4.1; the deviation is that of PEFT.
    """

    def started(self, w: FrozenMatrix, rank: int) -> Started:  # noqa: ARG002
        return Started(keras.initializers.RandomNormal(stddev=1 / rank), keras.initializers.Zeros())


@final
@dataclass(frozen=True)
class Lookup(Start):
    """`A` zero and `B` standard normal: training first moves the rows of `A` of the tokens seen.

    Reference: PEFT and the authors' loralib, https://github.com/microsoft/LoRA.
    """

    def started(self, w: FrozenMatrix, rank: int) -> Started:  # noqa: ARG002
        return Started(keras.initializers.Zeros(), keras.initializers.RandomNormal(stddev=1.0))


EMBEDDING_START = Lookup()
STARTS: dict[str, Start] = {"kaiming_uniform": Uniform(), "gaussian": Gaussian()}
