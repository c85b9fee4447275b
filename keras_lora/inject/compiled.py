"""A model's compiled functions and optimizer, which go stale when its layers change.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_layers`: missing from a model whose constructor failed, which may still be alive.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from keras_lora.distribution import strategy_scope
from keras_lora.inject.moments import OptimizerMove
from keras_lora.walker import Tree, all_layers

FUNCTIONS = ("train_function", "test_function", "predict_function", "generate_function")


def models_around(tree: Tree, layers: Iterable[keras.layers.Layer]) -> list[keras.Model]:
    """Every live model that contains one of the layers of a tree, however deep.

    A layer does not know the models that contain it, and an outer model that has run `predict`
    keeps a graph of the layer as it was. So all live objects are searched, by `type`, since
    `isinstance` would touch the lazy proxies that some libraries leave around.
    """
    wanted = {id(layer) for layer in layers}
    found = [o for o in gc.get_objects() if issubclass(type(o), keras.Model)]
    models = [m for m in found if getattr(m, "_layers", None)]  # one may have failed in __init__
    return [m for m in models if any(id(v) in wanted for v in _layers_of(m, tree) if v is not m)]


def _layers_of(model: keras.Model, tree: Tree) -> Sequence[keras.layers.Layer]:
    return tree.within(model) if id(model) in tree.children else all_layers(model)


def around(tree: Tree, layers: Sequence[keras.layers.Layer]) -> list[Any]:
    """The models whose compiled functions a change of these layers makes stale."""
    found, model = models_around(tree, layers), tree.root
    inside = any(m is model for m in found) or not isinstance(model, keras.Model)
    return found if inside else [*found, model]


@contextlib.contextmanager
def changing(
    tree: Tree,
    layers: Sequence[keras.layers.Layer],
    functions: Sequence[str] = FUNCTIONS,
) -> Iterator[None]:
    """Around a change of layers: drop the compiled functions, and renew each optimizer whose
    trainable variables change. Moments move with the adapters.
    """
    models = around(tree, layers)
    with strategy_scope(tree):
        moves = [OptimizerMove(tree, model) for model in models]
    try:
        yield
    finally:
        refresh(models, functions)
        with strategy_scope(tree):
            for move in moves:
                move.finish()


def refresh(models: Sequence[keras.Model], functions: Sequence[str] = FUNCTIONS) -> None:
    """Drop the compiled functions; Keras makes new ones when they are next needed."""
    for model in models:
        for name in functions:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)


def stale_when_flags_change() -> Sequence[str]:
    """The functions that depend on which variables train. On JAX all do, since they are given the
    variables in two lists: those that train and the others.
    """
    return ("train_function",) if keras.backend.backend() == "tensorflow" else FUNCTIONS
