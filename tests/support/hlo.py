"""A training step as XLA gets it: StableHLO on JAX, lowered for a TPU, and HLO on TensorFlow."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from support.shapes import jax_state

Shape = tuple[int, ...]
Sum = tuple[str, Shape]
# The operations that a gradient of a matrix may be, their operands and what they return.
Found = tuple[str, list[Shape], Shape]

_SUMS = ("dot", "dot_general", "convolution", "reduce", "scatter")
_STABLE = re.compile(rf"stablehlo\.({'|'.join(_SUMS)})\b")
_STABLE_TYPES = re.compile(r": \((tensor<.*)\) -> tensor<([^>]*)>")
# Python, or another program on the host.
_HOST = re.compile(r"(?:stablehlo\.|\s)(custom[-_]call|infeed|outfeed|send|recv)\(?")


def lowered(model: keras.Model, x: Any, y: Any, platform: str = "tpu") -> str:
    """The training step of a compiled model, on JAX for a platform that need not be here."""
    if keras.backend.backend() == "tensorflow":
        tf = importlib.import_module("tensorflow")
        model._symbolic_build(data_batch=(x, y))
        step = tf.function(model.train_step, jit_compile=True)
        data = tf.nest.map_structure(tf.constant, (x, y))
        return str(step.experimental_get_compiler_ir(data)(stage="hlo"))
    jax = importlib.import_module("jax")
    traced = jax.jit(model.train_step).trace(jax_state(model, x, y), (x, y))
    return str(traced.lower(lowering_platforms=(platform,)).as_text())


def dynamic_shapes(text: str) -> list[str]:
    return re.findall(r"tensor<[^>]*\?[^>]*>|\w+\[[^\]]*<=[^\]]*\]", text)


def host_calls(text: str) -> list[str]:
    return _HOST.findall(text)


def sums_over(rows: int, text: str) -> Iterator[Sum]:
    """The operation and the shape of each sum over a batch of so many rows, a prime number.

    The gradient of a matrix is such a sum, and what is computed for rows is none: where no other
    dimension is a multiple of it, a shape tells whether it has the rows.
    """
    found = Hlo(text).sums() if text.startswith("HloModule") else _stable_sums(text)
    for operation, operands, result in found:
        # Of a reduction or a scatter the other operands are beginnings and places.
        summed = {"reduce": operands[:1], "scatter": operands[-1:]}.get(operation, operands)
        if math.prod(result) % rows and all(math.prod(shape) % rows == 0 for shape in summed):
            yield operation, result


def _stable_sums(text: str) -> Iterator[Found]:
    operation = None
    for line in text.splitlines():
        begun = _STABLE.search(line)
        operation = begun[1] if begun else operation
        types = _STABLE_TYPES.search(line)
        if operation and types:  # those of a scatter are some lines below it
            shapes = re.findall(r"tensor<([^>]*)>", types[1])
            yield operation, [_dims(shape, "x") for shape in shapes], _dims(types[2], "x")
            operation = None


def _dims(shape: str, between: str) -> Shape:
    return tuple(int(n) for n in shape.split(between) if n.isdigit())


_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) .*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, (\w+=.*))?$")
_SHAPES = re.compile(r"\w+\[([\d,]*)\]")

# A computation, one of its instructions, and an index if one element of a tuple is needed alone.
Needed = tuple[str, str, int | None]


def _values(operands: str) -> list[str]:
    return re.findall(r"%([^\s,)]+)", operands)


class Hlo:
    """The text of a module, of which only what its results need counts.

    TensorFlow computes the gradients of frozen variables, and lets XLA find that nothing needs
    them, in loops too: an element of the state that no other needs.
    """

    def __init__(self, text: str) -> None:
        # By computation and name: type, operation, operands and the rest of the line.
        self.lines: dict[tuple[str, str], tuple[str, str, str, str]] = {}
        self.roots: dict[str, str] = {}
        self.callers: dict[str, list[tuple[str, str]]] = {}
        self.live: set[Needed] = set()
        here = ""
        for line in text.splitlines():
            if begun := _COMPUTATION.match(line):
                here = entry = begun[1]
            elif found := _INSTRUCTION.match(line):
                root, name, *parts = found.groups(default="")
                self.lines[here, name] = (parts[0], parts[1], parts[2], parts[3])
                self.roots |= {here: name} if root else {}
                for called in self._called(parts[3]) if parts[1] in ("while", "call") else ():
                    self.callers.setdefault(called, []).append((here, name))
        self._need([(entry, self.roots[entry], None)])  # the entry is the last computation

    def sums(self) -> Iterator[Found]:
        for here, name in {(here, name) for here, name, _ in self.live}:
            result, operation, operands, _ = self.lines[here, name]
            if operation in _SUMS and not result.startswith("("):
                shapes = [_dims(shape, ",") for shape in _SHAPES.findall(operands)]
                yield operation, shapes, _dims(_SHAPES.findall(result)[0], ",")

    def _need(self, left: list[Needed]) -> None:
        while left:
            needed = left.pop()
            if needed not in self.live:
                self.live.add(needed)
                left += self._needed_by(*needed)

    def _needed_by(self, here: str, name: str, index: int | None) -> Iterable[Needed]:
        """What an instruction needs, or what its element of this index needs."""
        _, operation, operands, rest = self.lines[here, name]
        values = _values(operands)
        if operation == "get-tuple-element":
            return [(here, values[0], int(re.findall(r"index=(\d+)", rest)[0]))]
        if operation == "tuple" and index is not None:
            return [(here, values[index], None)]
        if operation == "parameter":
            callers = self.callers.get(here, ())
            return [self._given(*caller, int(operands), index) for caller in callers]
        if operation == "call":
            return [(called, self.roots[called], index) for called in self._called(rest)]
        if operation == "while":
            body, condition = (
                re.findall(rf"{x}=%([^\s,]+)", rest)[0] for x in ("body", "condition")
            )
            state = [(here, values[0], index), (body, self.roots[body], index)]
            return [*state, (condition, self.roots[condition], None)]
        inside = [(called, self.roots[called], None) for called in self._called(rest)]
        return [*((here, value, None) for value in values), *inside]

    def _given(self, here: str, name: str, number: int, index: int | None) -> Needed:
        """What an instruction gives to a parameter of what it calls."""
        if self.lines[here, name][1] == "while":
            return here, name, index
        return here, _values(self.lines[here, name][2])[number], index

    @staticmethod
    def _called(rest: str) -> list[str]:
        return re.findall(r"(?:to_apply|body|condition|calls|_computation)=%([^\s,]+)", rest)
