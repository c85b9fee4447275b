"""The group that a variable trains in: what an optimizer's rates are given for."""

from __future__ import annotations

import keras

from keras_lora.layers.owned import owned

_GROUP = "_lora_group"


def in_group(variable: keras.Variable, group: str) -> keras.Variable:
    """Note the group of a variable: of a slot, or of a head or bias from a `.keras` file."""
    setattr(variable, _GROUP, group)
    return variable


def group_of(variable: keras.Variable) -> str | None:
    """`"a"`, `"b"`, `"magnitudes"` or `"tokens"` in a slot, `"heads"` or `"biases"` of the base.

    None for every other variable.

    A variable of the base that trains for an adapter is a head's if the adapter owns all variables
    of its layer, as with `layers_to_save`, and otherwise a bias that `bias` selects.
    """
    item = owned(variable)
    if item is None:  # also in a model from a file, which does not say who owns what
        return getattr(variable, _GROUP, None)
    values = [owned(v) for v in item.layer.weights]
    whole = all(value is not None and item.owner in value.names for value in values)
    return "heads" if whole else "biases"
