"""What a start is: how the factors `A` and `B` of an adapter begin.

    h = x W0 + s (x A B - x A0 B0)        A begins at A0, B at B0

A fresh adapter computes what its base does, and `W0` is never changed: `A0 B0` is zero, or it is
taken off again as the frozen counterpart of `A B`. A start that corrects a quantized base is the
exception: its `A0 B0` is what the base lacks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from keras import ops

from keras_lora.lowrank.equations import Shape, Tensor

Measure = Literal["inputs", "gradient", "weights"]
# Called as `initializer(shape, dtype)`, when the factor is first needed.
Initializer = Callable[[Shape, str], Tensor]


@dataclass(frozen=True)
class FrozenMatrix:
    """What a start may know of `W0`, as a matrix for each index of its shared axes.

    Attributes:
        shape: `(shared, d, k)`: `d` inputs and `k` outputs.
        values: Gives `W0` in that shape, in float32 or wider; computed when it is called.
        measured: What a start that `measures` has measured on data: inputs `(shared, n, d)` that
            have the right-singular vectors of all inputs, the gradient `(shared, d, k)`, or
            a function that gives the weights in floating point of a quantized `W0`, likewise.
    """

    shape: tuple[int, int, int]
    values: Callable[[], Tensor]
    measured: Any = None


@dataclass(frozen=True)
class Started:
    """How `A` and `B` begin.

    Attributes:
        a: The initializer of `A`.
        b: The initializer of `B`.
    """

    a: Initializer
    b: Initializer

    def drawn_once(self) -> Started:
        """The same, with the same values at each call: for `A` and for `A0`."""
        return Started(_once(self.a), _once(self.b))


def _once(draw: Initializer) -> Initializer:
    values = cache(lambda shape: ops.convert_to_numpy(draw(shape, "float32")))
    return lambda shape, dtype: ops.convert_to_tensor(values(tuple(shape)), dtype)


class Start(ABC):
    """Abstract: a way to begin the factors of an adapter.

    Attributes:
        has_counterpart: Whether `A0 B0` is not zero, so that a frozen copy is taken off.
        yields: Whether a kind that begins in a way of its own, as embeddings do, goes before.
        measures: What is found before: on data the inputs of the layer, or the gradient of `W0`; in
            another model the weights that `W0` was before it was quantized.
    """

    has_counterpart: ClassVar[bool] = False
    yields: ClassVar[bool] = False
    measures: ClassVar[Measure | None] = None

    @abstractmethod
    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:
        """How `A`, `(d, rank)` as a matrix, and `B`, `(rank, k)`, begin; `scaling` is `s`."""
