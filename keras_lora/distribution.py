"""The devices that a model's variables belong to: a `tf.distribute` strategy, or a mesh on JAX.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_distribute_strategy`: in a scope, `distribute_strategy` of a model that was made in none names
        the scope's strategy.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any, final

import keras

from keras_lora.layers import Layout, layout_of
from keras_lora.walker import Tree


def strategy_scope(tree: Tree) -> contextlib.AbstractContextManager[Any]:
    """The scope that a model was made in, in which to make new variables of it.

    On TensorFlow that of its strategy. On JAX one in which variables have the layouts of the
    model's variables of their paths, and others are whole on each device of the model's mesh.

    Raises:
        ValueError: this code runs in a scope that the model was not made in.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _mesh_scope(tree)
    return _tensorflow_scope(tree) if backend == "tensorflow" else contextlib.nullcontext()


def _tensorflow_scope(tree: Tree) -> contextlib.AbstractContextManager[Any]:
    if not tree.models:
        return contextlib.nullcontext()
    distribute = importlib.import_module("tensorflow").distribute
    current = distribute.get_strategy() if distribute.has_strategy() else None
    made_in = (model._distribute_strategy for model in tree.models)
    own: Any = next((strategy for strategy in made_in if strategy is not None), None)
    if isinstance(own, distribute.ParameterServerStrategy):
        raise ValueError(
            "Expected a model made in the scope of a strategy that Keras 3 trains in. Received: "
            f"'{tree.root.name}', made in that of a {type(own).__name__}, for which `fit` has no "
            "coordinator. Use MirroredStrategy."
        )
    if own is current:
        return contextlib.nullcontext()
    if current is None:
        return own.scope()
    raise _elsewhere(
        tree, current, "no scope" if own is None else f"that of a {type(own).__name__}"
    )


def _mesh_scope(tree: Tree) -> contextlib.AbstractContextManager[Any]:
    current = keras.distribution.distribution()
    layouts = {v.path: x for v in tree.root.variables if (x := layout_of(v)) is not None}
    if current is not None and tree.root.variables and not layouts:
        raise _elsewhere(tree, current, "no scope")
    if current is not None or not layouts:
        return contextlib.nullcontext()
    return _OnMesh(layouts).scope()


def _elsewhere(tree: Tree, current: Any, made: str) -> ValueError:
    return ValueError(
        "Expected a call in the scope that the model was made in, or outside of any. Received: a "
        f"call in the scope of a {type(current).__name__}, for '{tree.root.name}', which was made "
        f"in {made}. Make the model in the scope that it is to train in."
    )


@final
class _OnMesh(keras.distribution.ModelParallel):
    """Variables have layouts by path; other variables, and data, are whole on each device."""

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        known = keras.distribution.LayoutMap(next(iter(layouts.values())).device_mesh)
        for path, layout in layouts.items():
            known[path] = layout
        super().__init__(layout_map=known)

    def get_data_layout(self, data_shape: Any) -> Layout:
        return keras.distribution.TensorLayout([None] * len(data_shape), self.device_mesh)
