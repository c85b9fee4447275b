"""What the code of a layer names, so that only a model that may need it is tried on symbols."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import keras

from keras_lora.layers import plain_class
from keras_lora.walker import Layer

# The code of these packages reads the matrices of other layers only as `layer.kernel`, which is the
# effective matrix of an adapted layer.
_KNOWN = {"keras", "keras_hub", "keras_lora"}
# The layers of Keras that assign to variables while they train, frozen or not.
ASSIGNING = (keras.layers.SpectralNormalization, keras.layers.JaxLayer, keras.layers.FlaxLayer)
# Without one of these names no code gets at a variable of another layer, or assigns to one.
_NAMES = {
    *("weights", "trainable_weights", "non_trainable_weights", "get_weights"),
    *("variables", "trainable_variables", "non_trainable_variables", "base_kernel"),
    *("_kernel", "_embeddings", "getattr", "assign", "assign_add", "assign_sub"),
}


def may_touch_variables(layer: Layer) -> bool:
    """Whether a layer's code may read the variables of others, or assign to variables."""
    seen: set[int] = set()
    functions = (f for value in _own_values(layer) for f in _functions(value, seen))
    return isinstance(layer, ASSIGNING) or any(_names(f.__code__) & _NAMES for f in functions)


def _own_values(layer: Layer) -> Iterator[Any]:
    """What a layer has beyond the classes of known packages."""
    yield from vars(layer).values()
    for layer_class in plain_class(layer).__mro__:
        # Keras's models descend from classes of TensorFlow or torch too.
        if not _is_known(layer_class) and layer_class not in keras.Model.__mro__:
            yield from vars(layer_class).values()


def _is_known(item: Any) -> bool:
    return str(item.__module__).split(".")[0] in _KNOWN


def _functions(value: Any, seen: set[int]) -> Iterator[FunctionType]:
    """A function, those in its closure, and those that it may call by a global name."""
    if isinstance(value, property):
        value = value.fget
    value = value.__func__ if isinstance(value, MethodType | staticmethod | classmethod) else value
    value = inspect.unwrap(value) if callable(value) else value
    if not isinstance(value, FunctionType) or id(value) in seen or _is_known(value):
        return
    seen.add(id(value))
    yield value
    called = [value.__globals__.get(name) for name in _names(value.__code__)]
    for other in [*called, *inspect.getclosurevars(value).nonlocals.values()]:
        yield from _functions(other, seen)


def _names(code: CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names}.union(*inner)
