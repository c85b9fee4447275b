"""Names of layers and variables without the numbers that Keras adds, which differ by process."""

from __future__ import annotations

import re
from typing import TypeAlias

import keras

Layer: TypeAlias = "keras.layers.Layer"


def stable_name(layer: Layer) -> str:
    """The layer's name, without the number where Keras made the name from the class."""
    # `Bidirectional` puts a word before the names of its two layers.
    return _without_number(layer, rf"(?:forward_|backward_)?{re.escape(_keras_name(type(layer)))}")


def stable_name_0_1(layer: Layer) -> str:
    """`stable_name` as version 0.1.0 had it: other where a class's name has an underscore.

    The keys of its files are made of these names.
    """
    name = re.sub(r"([a-z])([A-Z])", r"\1_\2", type(layer).__name__)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return _without_number(layer, re.escape(re.sub("_+", "_", name).lower()))


def stable_variable_name(variable: keras.Variable) -> str:
    """The variable's name, without the number where Keras named it.

    Keras counts all variables without a name in one process: `variable`, `variable_1`...
    """
    name = str(variable.name)
    return "variable" if re.fullmatch(r"variable_\d+", name) else name


def variable_name_0_1(variable: keras.Variable) -> str:
    """`stable_variable_name` as version 0.1.0 had it: with the number."""
    return str(variable.name)


def _without_number(layer: Layer, made: str) -> str:
    found = re.fullmatch(rf"({made})_\d+", layer.name)
    return found[1] if found else str(layer.name)


def _keras_name(layer_class: type) -> str:
    """The name that Keras gives to the first layer of a class."""
    name = re.sub(r"\W+", "", layer_class.__name__)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
