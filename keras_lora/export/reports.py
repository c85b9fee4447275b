"""The reports of the exports: plain values, which need no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Shape: TypeAlias = tuple[int | None, ...]


@dataclass(frozen=True)
class GraphReport:
    """The report of `check_saved_model` on the graph of a SavedModel.

    Attributes:
        operations: Number of operations, functions included.
        problems: The parts that a server cannot run, each with the reason and the fix; empty if
            a server can run all.
        text_operations: Operations of tensorflow-text, which a server must have linked in.

    Example:

    >>> GraphReport(operations=12, problems=(), text_operations=()).problems
    ()
    """

    operations: int
    problems: Sequence[str]
    text_operations: Sequence[str]


@dataclass(frozen=True)
class RuntimeReport:
    """The report of `export_onnx` and `export_litert` on the file, which its runtime has run.

    Attributes:
        inputs: The shape of each input by its name, with None for an axis of any size.
        outputs: The names of the outputs.
        difference: The largest difference from the model's own answers, relative to the largest
            of these answers if that is above 1.

    Example:

    >>> RuntimeReport({"x": (None, 3)}, ("up",), difference=0.0).inputs
    {'x': (None, 3)}
    """

    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]
    difference: float
