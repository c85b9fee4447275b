"""The tensors of many adapters, stacked, so that a request reads the tensors of its adapters alone.

An adapter consists of tensors: the factors, and its values of heads and biases. All tensors of one
width lie in one *stack*, an array `(n, width)`. A factor `A` `(d, r)` is `r` vectors of width `d`
in it, one for each column, so adapters of every rank lie one after the other and nothing is padded.

Adapters are numbered; the base is number 0. `places[number, tensor]` is the index of the tensor's
first vector in its stack, and how many vectors it has. Vector 0 of a stack with factors is zero:
the factor of an adapter that does not adapt the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

NAMES, PLACES = "names", "places"  # keys of two stored arrays; `stack_key` gives the others


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor that adapters have: a factor, or a whole value such as a bias.

    Attributes:
        key: Its name in an adapter's files.
        shape: Its shape. The axis of a factor's rank is None, since each adapter has its own.

    Example:

    >>> tensor = AdapterTensor("up/lora_b", (None, 12, 64))
    >>> tensor.width, tensor.vectors(np.zeros((8, 12, 64))).shape, tensor.shape_at(2)
    (768, (8, 768), (2, 12, 64))
    """

    key: str
    shape: tuple[int | None, ...]

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """The shape of one vector, before it is made flat."""
        return tuple(size for size in self.shape if size is not None)

    @property
    def width(self) -> int:
        return math.prod(self.vector_shape)

    @property
    def is_factor(self) -> bool:
        return None in self.shape

    def shape_at(self, rank: int) -> tuple[int, ...]:
        """The shape in an adapter of this rank; a whole value has one shape at every rank."""
        return tuple(rank if size is None else size for size in self.shape)

    def vectors(self, value: Array) -> Array:
        """A value as vectors: `(rank, width)` of a factor, `(1, width)` of a whole value."""
        axis = self.shape.index(None) if self.is_factor else 0
        first = np.moveaxis(value, axis, 0) if self.is_factor else value
        return first.reshape(-1, self.width)


class AdapterStacks:
    """Stacks to which adapters are added, one after the other; the base is the first."""

    def __init__(self, tensors: Sequence[AdapterTensor]) -> None:
        self.tensors = tuple(tensors)
        self.names: list[str] = []
        self._places: list[Array] = []
        factors = {tensor.width for tensor in tensors if tensor.is_factor}
        self._stacks = {w: np.zeros((int(w in factors), w), "float32") for w in widths(tensors)}

    @classmethod
    def of(cls, tensors: Sequence[AdapterTensor], stored: Mapping[str, Array]) -> AdapterStacks:
        """The inverse of `stored`."""
        stacks = cls(tensors)
        stacks.names = [name.decode() for name in stored[NAMES].tolist()]
        stacks._places = list(stored[PLACES])
        stacks._stacks = {width: np.array(stored[stack_key(width)]) for width in stacks._stacks}
        return stacks

    def add(self, name: str, values: Mapping[str, Array]) -> None:
        """Add an adapter with these values by key; a value that it lacks is the base's."""
        # The base has no factors: the places of its factors are vector 0, which is zero.
        base = self._places[0] if self._places else np.zeros((len(self.tensors), 2), "int32")
        places = base.copy()
        for index, tensor in enumerate(self.tensors):
            if tensor.key in values:
                places[index] = self._put(tensor, values[tensor.key])
        self.names.append(name)
        self._places.append(places)

    def stored(self) -> dict[str, Array]:
        """The arrays to write: names, places and stacks, by key."""
        stacks = {stack_key(width): stack for width, stack in self._stacks.items()}
        names = np.array([name.encode() for name in self.names], dtype=object)
        return {NAMES: names, PLACES: np.stack(self._places), **stacks}

    def _put(self, tensor: AdapterTensor, value: Array) -> tuple[int, int]:
        new, stack = tensor.vectors(value), self._stacks[tensor.width]
        first = len(stack)
        # In place: all adapters together may be larger than the base.
        stack.resize((first + len(new), tensor.width), refcheck=False)
        stack[first:] = new
        return first, len(new)


def widths(tensors: Sequence[AdapterTensor]) -> list[int]:
    return sorted({tensor.width for tensor in tensors})


def stack_key(width: int) -> str:
    return f"rows/{width}"  # part of the format of exported models, so it stays
