"""Tensors without values: operations of a converter are recorded, and repeated on indices later.

A converter of KerasHub computes with numpy on the weights of a file. Without the file, neither the
values nor the shapes of the weights are known. So each operation makes a node of a tree. The shape
of the variable at the root gives the shapes of the weights at the leaves (`demands`). Then the
operations are repeated on arrays of indices (`evaluate`), which show where each element went.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_lora.lowrank.equations import Shape

Array = np.ndarray[Any, Any]
Shapes = dict[str, Shape]


class Traced(np.lib.mixins.NDArrayOperatorsMixin, abc.ABC):
    """A tensor without values, with which numpy computes. Equality ignores the keys of weights."""

    parts: tuple[Traced, ...]
    dtype = np.dtype("float32")

    @abc.abstractmethod
    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:
        """The shapes that each part can have, or must have at least, for this tensor's `shape`.

        A reshape hides the shape before it, so each of the `guesses` is tried for that shape.
        """

    @abc.abstractmethod
    def apply(self, parts: Sequence[Array]) -> Array:
        """Repeat the operation on the values of the parts."""

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Traced:
        try:
            return _OPERATIONS[function.__name__](*args, **kwargs)
        except (KeyError, TypeError):  # an unknown function, or unknown arguments
            return computed(function.__name__, args)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Traced:
        return computed(ufunc.__name__, inputs)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        # Keras asks for this array where a converter adds a weight to a variable. NaN makes the
        # sum useless, so that no one takes it for a value.
        return np.array(np.nan, dtype)

    @property
    def T(self) -> Traced:  # noqa: N802
        return _transpose(self)

    def transpose(self, *axes: Any) -> Traced:
        return _transpose(self, axes[0] if len(axes) == 1 else axes)

    def reshape(self, *shape: Any) -> Traced:
        return _reshape(self, shape[0] if len(shape) == 1 else shape)

    def astype(self, dtype: Any) -> Traced:  # noqa: ARG002
        return self  # a cast moves no element

    def __getitem__(self, index: Any) -> Traced:
        index = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, int) or _is_range(i) for i in index):
            return computed("indexing", [self])
        bounds = (i if isinstance(i, int) else (i.start, i.stop) for i in index)
        return Sliced((self,), tuple(bounds))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Ignored: converters write only into tensors that are `Computed` anyway."""


def _is_range(index: Any) -> bool:
    if not isinstance(index, slice) or index.step is not None:
        return False
    return all(b is None or (isinstance(b, int) and b >= 0) for b in (index.start, index.stop))


@dataclass(frozen=True)
class Weight(Traced):
    """A weight of the Hugging Face checkpoint."""

    key: str = field(compare=False)
    axes: int = 0
    parts: tuple[Traced, ...] = ()

    @property
    def shape(self) -> tuple[Traced, ...]:
        """For a converter that asks: an unknown length for each axis that is assumed."""
        if not self.axes:
            raise AttributeError(f"the shape of {self.key} is not known")
        return (computed("shape", [self]),) * self.axes

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        return iter(())

    def apply(self, parts: Sequence[Array]) -> Array:
        raise NotImplementedError("a weight is given, not computed")


@dataclass(frozen=True)
class Transposed(Traced):
    """With the axes in another order, by default the reverse one."""

    parts: tuple[Traced, ...]
    axes: tuple[int, ...] = ()

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        axes = [a % len(shape) for a in self.axes] or list(range(len(shape)))[::-1]
        if len(axes) == len(shape):
            yield tuple(shape[axes.index(i)] for i in range(len(shape)))

    def apply(self, parts: Sequence[Array]) -> Array:
        return np.transpose(parts[0], self.axes or None)


@dataclass(frozen=True)
class Reshaped(Traced):
    """With another shape and the elements in the same order."""

    parts: tuple[Traced, ...]
    shape_after: Shape

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:
        if len(self.shape_after) == len(shape) and all(
            size in (-1, expected) for size, expected in zip(self.shape_after, shape, strict=True)
        ):
            yield from (guess for guess in guesses if math.prod(guess) == math.prod(shape))

    def apply(self, parts: Sequence[Array]) -> Array:
        return parts[0].reshape(self.shape_after)


@dataclass(frozen=True)
class Squeezed(Traced):
    """Without an axis of length 1, or without all axes of length 1."""

    parts: tuple[Traced, ...]
    axis: int | None = None

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        if self.axis is None:
            yield shape
        else:
            axis = self.axis % (len(shape) + 1)
            yield (*shape[:axis], 1, *shape[axis:])

    def apply(self, parts: Sequence[Array]) -> Array:
        return np.squeeze(parts[0], self.axis)


@dataclass(frozen=True)
class Sliced(Traced):
    """Indexed by integers and ranges `(start, stop)` along the first axes."""

    parts: tuple[Traced, ...]
    index: tuple[int | tuple[int | None, int | None], ...]

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        rest, sizes = list(shape), []
        for i in self.index:
            if isinstance(i, int):
                sizes.append(i + 1)
                continue
            stop = (i[0] or 0) + rest.pop(0) if rest else None
            if stop is None or i[1] not in (None, stop):
                return
            sizes.append(stop)
        yield (*sizes, *rest)

    def apply(self, parts: Sequence[Array]) -> Array:
        return parts[0][tuple(i if isinstance(i, int) else slice(*i) for i in self.index)]


@dataclass(frozen=True)
class Joined(Traced):
    """Concatenated from parts of equal size."""

    parts: tuple[Traced, ...]
    axis: int = 0

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        sizes = list(shape)
        sizes[self.axis], rest = divmod(sizes[self.axis], len(self.parts))
        if not rest:
            yield tuple(sizes)

    def apply(self, parts: Sequence[Array]) -> Array:
        return np.concatenate(parts, self.axis)


@dataclass(frozen=True)
class Stacked(Traced):
    """Stacked along a new axis."""

    parts: tuple[Traced, ...]
    axis: int = 0

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        sizes = list(shape)
        if sizes.pop(self.axis) == len(self.parts):
            yield tuple(sizes)

    def apply(self, parts: Sequence[Array]) -> Array:
        return np.stack(parts, self.axis)


@dataclass(frozen=True)
class Computed(Traced):
    """Computed from weights in a way that does more than move elements."""

    parts: tuple[Traced, ...]
    function: str

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        return iter(())

    def apply(self, parts: Sequence[Array]) -> Array:
        raise NotImplementedError(f"{self.function} does more than move elements")


def nodes(value: Traced) -> Iterator[Traced]:
    """A tensor and all the tensors that it was made of."""
    yield value
    for part in value.parts:
        yield from nodes(part)


def weight_keys(value: Traced) -> list[str]:
    """The keys of the weights in a tensor, in order; a weight that is used twice comes twice."""
    return [node.key for node in nodes(value) if isinstance(node, Weight)]


def demands(value: Traced, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shapes]:
    """The shapes that the weights can have, or must have at least, if `value` has `shape`."""
    if isinstance(value, Weight):
        yield {value.key: shape}
    for before in value.before(shape, guesses):
        for each in itertools.product(*(demands(part, before, guesses) for part in value.parts)):
            yield least_shapes(each)


def least_shapes(demanded: Sequence[Shapes]) -> Shapes:
    """The smallest shapes that meet all demands.

    Where demands on a weight differ in the number of axes, the first demand counts.
    """
    shapes: Shapes = {}
    for key, shape in (item for each in demanded for item in each.items()):
        known = shapes.setdefault(key, shape)
        if len(known) == len(shape):
            shapes[key] = tuple(max(sizes) for sizes in zip(known, shape, strict=True))
    return shapes


def evaluate(value: Traced, weights: Mapping[str, Array]) -> Array:
    """Repeat the recorded operations on the values of weights."""
    if isinstance(value, Weight):
        return weights[value.key]
    return value.apply([evaluate(part, weights) for part in value.parts])


def computed(function: str, arguments: Sequence[Any]) -> Computed:
    flat = [a for x in arguments for a in (x if isinstance(x, (list, tuple)) else [x])]
    return Computed(tuple(a for a in flat if isinstance(a, Traced)), function)


def _transpose(x: Traced, axes: Sequence[int] | None = None) -> Traced:
    return Transposed((x,), tuple(axes or ()))


def _reshape(x: Traced, shape: Any) -> Traced:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(size, int) for size in sizes):
        return computed("reshape", (x, *sizes))
    return Reshaped((x,), sizes)


def _squeeze(x: Traced, axis: int | None = None) -> Traced:
    return Squeezed((x,), axis)


def _concatenate(parts: Sequence[Traced], axis: int = 0) -> Traced:
    return Joined(tuple(parts), axis)


def _stack(parts: Sequence[Traced], axis: int = 0) -> Traced:
    return Stacked(tuple(parts), axis)


_OPERATIONS: dict[str, Callable[..., Traced]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "concatenate": _concatenate,
    "stack": _stack,
}
