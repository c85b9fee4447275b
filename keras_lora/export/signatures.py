"""The inputs and outputs of a model, with a name for each tensor.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_build_shapes_dict`: the shapes that a subclassed model was built for. Nothing else is
        known of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_lora.checks import invalid


def input_specs(model: keras.Model, given: Any | None) -> Any:
    """The structure of `tf.TensorSpec` that the model is called with, each leaf with its name."""
    if given is not None:
        structure = given
    elif isinstance(model, keras.Sequential):
        (structure,) = model.inputs
    elif getattr(model, "inputs", None) is not None:
        structure = model.input
    else:
        structure = _built_for(model)
    leaves = keras.tree.flatten(structure)
    names = leaf_names(structure, "input")
    specs = [_tensor_spec(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
    return keras.tree.pack_sequence_as(structure, specs)


def _built_for(model: keras.Model) -> Any:
    shapes = model._build_shapes_dict or {}
    if len(shapes) != 1:
        raise invalid(
            "model",
            "a model with symbolic inputs, or one built for a single structure of inputs",
            f"{model.name!r} built for {dict(shapes)}",
            "pass input_signature",
        )
    (structure,) = shapes.values()
    return _specs_of_shapes(structure, model.input_dtype)


def _specs_of_shapes(structure: Any, dtype: str) -> Any:
    """A structure of shapes as a structure of specs; each shape is a tuple in the structure."""
    if isinstance(structure, Mapping):
        return {key: _specs_of_shapes(value, dtype) for key, value in structure.items()}
    if all(size is None or isinstance(size, int) for size in structure):
        return keras.InputSpec(shape=(None, *structure[1:]), dtype=dtype)
    return [_specs_of_shapes(value, dtype) for value in structure]


def _tensor_spec(leaf: Any, name: str) -> tf.TensorSpec:
    shape = tuple(leaf.shape)
    return tf.TensorSpec((None, *shape[1:]), leaf.dtype, name=getattr(leaf, "name", None) or name)


def leaf_names(structure: Any, prefix: str) -> list[str]:
    """A name for each leaf: its key in a dict, or `<prefix>_<position>`."""
    if isinstance(structure, Mapping) and not any(map(keras.tree.is_nested, structure.values())):
        return [str(key) for key in sorted(structure)]
    return [f"{prefix}_{i}" for i in range(len(keras.tree.flatten(structure)))]


def output_names(model: keras.Model, outputs: Any) -> list[str]:
    """A name for each output: the model's own, the key in a dict, or `output_<position>`."""
    names = getattr(model, "output_names", None)
    if isinstance(model, keras.Sequential):
        return [model.layers[-1].name]
    if isinstance(outputs, Mapping) or names is None:
        return leaf_names(outputs, "output")
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
