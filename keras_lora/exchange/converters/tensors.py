"""Tensors without values: what a converter does to a weight is noted, and done later to indices.

A converter of KerasHub computes with numpy on weights of a file. Here there is no file, and the
shapes of its weights are unknown. So each operation makes a node of a tree; from the shape of the
variable at its root follow the shapes of the weights at its leaves (`demands`), and then the
operations are repeated on arrays of indices (`evaluate`).
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
    """A tensor without values; to numpy, an array. Two are equal if they differ in keys only."""

    parts: tuple[Traced, ...]
    dtype = np.dtype("float32")

    @abc.abstractmethod
    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:
        """The shapes that each part can have, or must have at least, if this has `shape`.

        `guesses` are tried for what is reshaped, since a reshape hides the shape before it.
        """

    @abc.abstractmethod
    def apply(self, parts: Sequence[Array]) -> Array:
        """The operation itself."""

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Traced:
        try:
            return _OPERATIONS[function.__name__](*args, **kwargs)
        except (KeyError, TypeError):  # not known, or not known in this form
            return mixed(function.__name__, args)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Traced:
        return mixed(ufunc.__name__, inputs)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        # Keras gets this where a converter adds a weight to a variable: it spoils the result.
        return np.array(np.nan, dtype)

    @property
    def T(self) -> Traced:  # noqa: N802
        return _transpose(self)

    def transpose(self, *axes: Any) -> Traced:
        return _transpose(self, axes[0] if len(axes) == 1 else axes)

    def reshape(self, *shape: Any) -> Traced:
        return _reshape(self, shape[0] if len(shape) == 1 else shape)

    def astype(self, dtype: Any) -> Traced:  # noqa: ARG002
        return self  # it changes values, never their places

    def __getitem__(self, index: Any) -> Traced:
        index = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(i, int) or _is_range(i) for i in index):
            return mixed("indexing", [self])
        bounds = (i if isinstance(i, int) else (i.start, i.stop) for i in index)
        return Sliced((self,), tuple(bounds))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Only what is mixed already is written into."""


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
        """As many unknown lengths as it is assumed to have, for a converter that asks."""
        if not self.axes:
            raise AttributeError(f"the shape of {self.key} is not known")
        return (mixed("shape", [self]),) * self.axes

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        return iter(())

    def apply(self, parts: Sequence[Array]) -> Array:
        raise NotImplementedError("a weight is given, not computed")


@dataclass(frozen=True)
class Transposed(Traced):
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
    """Indexed by integers and by ranges `(start, stop)`; the axes beyond them are whole."""

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
    """Concatenated, of parts of one size."""

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
    parts: tuple[Traced, ...]
    axis: int = 0

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        sizes = list(shape)
        if sizes.pop(self.axis) == len(self.parts):
            yield tuple(sizes)

    def apply(self, parts: Sequence[Array]) -> Array:
        return np.stack(parts, self.axis)


@dataclass(frozen=True)
class Mixed(Traced):
    """Values that were computed from weights, not only moved."""

    parts: tuple[Traced, ...]
    function: str

    def before(self, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shape]:  # noqa: ARG002
        return iter(())

    def apply(self, parts: Sequence[Array]) -> Array:
        raise NotImplementedError(f"{self.function} does more than to move elements")


def nodes(value: Traced) -> Iterator[Traced]:
    """A tensor and all that it was made of."""
    yield value
    for part in value.parts:
        yield from nodes(part)


def weight_keys(value: Traced) -> list[str]:
    """The keys of the weights in a tensor, in order; again where one is used again."""
    return [node.key for node in nodes(value) if isinstance(node, Weight)]


def demands(value: Traced, shape: Shape, guesses: Sequence[Shape]) -> Iterator[Shapes]:
    """What the shapes of the weights can be, or must be at least, if `value` has `shape`."""
    if isinstance(value, Weight):
        yield {value.key: shape}
    for before in value.before(shape, guesses):
        for each in itertools.product(*(demands(part, before, guesses) for part in value.parts)):
            yield merged(each)


def merged(demanded: Sequence[Shapes]) -> Shapes:
    """The least shapes that meet all demands; of two numbers of axes, the first counts."""
    shapes: Shapes = {}
    for key, shape in (item for each in demanded for item in each.items()):
        known = shapes.setdefault(key, shape)
        if len(known) == len(shape):
            shapes[key] = tuple(max(sizes) for sizes in zip(known, shape, strict=True))
    return shapes


def evaluate(value: Traced, weights: Mapping[str, Array]) -> Array:
    """What a converter makes of these weights."""
    if isinstance(value, Weight):
        return weights[value.key]
    return value.apply([evaluate(part, weights) for part in value.parts])


def mixed(function: str, arguments: Sequence[Any]) -> Mixed:
    flat = [a for x in arguments for a in (x if isinstance(x, (list, tuple)) else [x])]
    return Mixed(tuple(a for a in flat if isinstance(a, Traced)), function)


def _transpose(x: Traced, axes: Sequence[int] | None = None) -> Traced:
    return Transposed((x,), tuple(axes or ()))


def _reshape(x: Traced, shape: Any) -> Traced:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(size, int) for size in sizes):
        return mixed("reshape", (x, *sizes))
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
